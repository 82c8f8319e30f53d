from pathlib import Path

import pytest
from data_samples import silent, story, text_data_of

from llmtrain.config.data import TextData
from llmtrain.config.model import TrainedBPE
from llmtrain.data.prepare import prepare_tokenizer


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty short stories, a file each."""
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (directory / f"{number:02}.txt").write_text(story(number))
    return directory


@pytest.fixture(scope="session")
def text_data(corpus_dir: Path) -> TextData:
    return text_data_of(f"{corpus_dir}/*.txt")


@pytest.fixture(scope="session")
def tokenizer_dir(text_data: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    return prepare_tokenizer(TrainedBPE(kind="bpe", vocab_size=310), text_data, outputs, silent)
