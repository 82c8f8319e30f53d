import json
import time
from pathlib import Path

import pytest
from data_samples import SHARES, preference_data_of, silent, story, text_data_of

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.data import Continuations, PreferenceData, TextData
from llmtrain.config.model import HFTokenizer, TrainedBPE
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.prepare import prepare_text, prepare_tokenizer
from llmtrain.data.prepare_preferences import prepare_preferences
from llmtrain.data.prepared import read_manifest, verify
from llmtrain.data.splits import SPLITS, SplitCorpus
from llmtrain.data.text import TokenShards
from llmtrain.data.tokenizer import decode_text, load_tokenizer, train_bpe
from llmtrain.errors import DataError, IntegrityError


@pytest.fixture(scope="module")
def outputs(tokenizer_dir: Path) -> Path:
    return tokenizer_dir.parents[1]


@pytest.fixture(scope="module")
def manifest(text_data: TextData, tokenizer_dir: Path, outputs: Path) -> DatasetManifest:
    return prepare_text(text_data, tokenizer_dir, outputs, silent)


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs, two for each of thirty prompts."""
    path = tmp_path_factory.mktemp("votes") / "votes.jsonl"
    lines = [
        {"prompt": story(number // 2, 10), "chosen": story(100 + number, 6), "rejected": story(200 + number, 3)}
        for number in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_bpe_sees_the_training_split_only(
    text_data: TextData, tokenizer_dir: Path, tmp_path: Path, outputs: Path
) -> None:
    texts = [document.text for split, document in SplitCorpus(text_data, tmp_path / "r", silent) if split == "train"]
    assert len(texts) < 30
    train_bpe(texts, 310, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_tokens_are_each_document_and_one_end_of_text(
    manifest: DatasetManifest, text_data: TextData, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    documents = list(SplitCorpus(text_data, tmp_path / "r", silent))
    for split in SPLITS:
        texts = [document.text for name, document in documents if name == split]
        shards = TokenShards(outputs / manifest.path, split)
        stored = [shards.document(index).tolist() for index in range(shards.num_documents)]
        assert [decode_text(tokenizer, ids[:-1]) for ids in stored] == texts
        assert all(ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id for ids in stored)
        counts = manifest.splits[split]
        assert counts.num_tokens == shards.num_tokens == sum(map(len, stored))
        assert counts.num_bytes == sum(len(text.encode()) for text in texts)
        assert counts.num_documents == len(texts)


def test_the_listing_says_what_each_document_is(manifest: DatasetManifest, corpus_dir: Path, outputs: Path) -> None:
    lines = (outputs / manifest.path / "documents.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [facts["name"] for facts in listed] == sorted(str(path) for path in corpus_dir.iterdir())
    assert {(facts["source"], facts["licence"]) for facts in listed} == {("text files", "CC0-1.0")}
    assert manifest.sources == {"text files": "CC0-1.0"}
    tokens = dict.fromkeys(SPLITS, 0)
    for facts in listed:
        tokens[facts["split"]] += facts["tokens"]
    assert tokens == {split: counts.num_tokens for split, counts in manifest.splits.items()}


def test_the_second_call_reads_the_manifest_only(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path
) -> None:
    said: list[str] = []
    start = time.perf_counter()
    assert prepare_tokenizer(TrainedBPE(kind="bpe", vocab_size=310), text_data, outputs, said.append) == tokenizer_dir
    assert prepare_text(text_data, tokenizer_dir, outputs, said.append) == manifest
    assert time.perf_counter() - start < 0.5
    assert said == []


def test_content_is_what_counts_not_shards_or_places(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    for path in corpus_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = text_data_of(f"{tmp_path}/*.txt")
    assert prepare_text(moved, tokenizer_dir, outputs, silent) == manifest
    smaller_shards = text_data.model_copy(update={"shard_tokens": 100})
    other = prepare_text(smaller_shards, tokenizer_dir, outputs, silent)
    assert other.path != manifest.path
    assert other.content_sha256 == manifest.content_sha256
    rows = [list(TokenShards(outputs / m.path, "train").evaluation_rows(64)) for m in (manifest, other)]
    assert [row.tolist() for row in rows[0]] == [row.tolist() for row in rows[1]]
    (tmp_path / "00.txt").write_text("another text")
    assert prepare_text(moved, tokenizer_dir, outputs, silent).content_sha256 != manifest.content_sha256


def test_a_changed_or_missing_file_is_named_with_the_next_step(
    text_data: TextData, tokenizer_dir: Path, tmp_path: Path
) -> None:
    manifest = prepare_text(text_data, tokenizer_dir, tmp_path, silent)
    verify(manifest, tmp_path)
    directory = tmp_path / manifest.path
    shard = directory / "test-00000.uint16"
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    read_manifest(directory)  # the size is right
    with pytest.raises(IntegrityError, match=r"test-00000.uint16 has changed .*; delete the directory"):
        verify(manifest, tmp_path)
    shard.write_bytes(content[:-2])
    with pytest.raises(IntegrityError, match="do not hold the"):
        prepare_text(text_data, tokenizer_dir, tmp_path, silent)
    shard.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        prepare_text(text_data, tokenizer_dir, tmp_path, silent)


def test_a_tokenizer_directory_keeps_its_ids_and_is_found_again(
    text_data: TextData, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    load_tokenizer(tokenizer_dir).save_pretrained(tmp_path / "mine")
    published = HFTokenizer(kind="hf", path=str(tmp_path / "mine"))
    prepared = prepare_tokenizer(published, text_data, outputs, silent)
    assert prepared != tokenizer_dir
    assert (prepared / "sha256").read_text() == (tokenizer_dir / "sha256").read_text()
    start = time.perf_counter()
    assert prepare_tokenizer(published, text_data, outputs, silent) == prepared
    assert time.perf_counter() - start < 0.2


def test_pairs_of_one_prompt_fall_into_one_split(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path, votes: Path
) -> None:
    data = preference_data_of(text_data, votes)
    prepared = prepare_preferences(data, manifest, tokenizer_dir, outputs, silent, max_tokens=200)
    prompts = {}
    for split in SPLITS:
        pairs = PreferencePairs(outputs / prepared.path, split)
        prompts[split] = {pairs.text(index).prompt for index in range(len(pairs))}
        assert len(pairs) == 2 * len(prompts[split])
        tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        assert tokens == prepared.splits[split].num_tokens
    assert sum(map(len, prompts.values())) == 30
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    verify(prepared, outputs)


def test_pairs_longer_than_the_model_reads_are_refused_and_another_limit_is_another_preparation(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    lines = [{"prompt": story(n, 10), "chosen": story(n, 5), "rejected": story(n, 6)} for n in range(30)]
    lines.append({"prompt": story(99, 10), "chosen": "no", "rejected": story(99, 300)})
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = preference_data_of(text_data, path)
    short, long = (prepare_preferences(data, manifest, tokenizer_dir, outputs, silent, limit) for limit in (200, 2000))
    assert (short.num_refused, long.num_refused) == (1, 0)
    assert short.content_sha256 != long.content_sha256
    refused = json.loads((outputs / short.path / "refused.jsonl").read_text())
    assert refused["where"] == f"{path}:31"
    assert "more than trainer.sequence_tokens=200" in refused["reason"]
    with pytest.raises(DataError, match="31 of 31 records are refused"):
        prepare_preferences(data, manifest, tokenizer_dir, outputs, silent, max_tokens=5)


def test_too_few_prompts_for_three_splits_is_an_error_that_says_what_to_do(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match=r"has 1 pairs, and none of them falls into .*; add pairs with other prompts"):
        prepare_preferences(preference_data_of(text_data, path), manifest, tokenizer_dir, outputs, silent, 100)


def test_continuations_stay_in_their_documents_split(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    pairs = Continuations(kind="continuations", prompt_characters=40, answer_characters=20, max_training_pairs=None)
    values = {"kind": "preferences", "corpus": text_data.corpus, "pairs": pairs, **SHARES}
    data = PreferenceData.model_validate(values)
    prepared = prepare_preferences(data, manifest, tokenizer_dir, outputs, silent, max_tokens=200)
    assert prepared.parents == (manifest.sha256,)
    documents = list(SplitCorpus(text_data, tmp_path / "r", silent))
    for split in SPLITS:
        texts = [document.text for name, document in documents if name == split]
        made = PreferencePairs(outputs / prepared.path, split)
        for index in range(len(made)):
            text = made.text(index)
            assert any(text.prompt + text.chosen in document for document in texts)
            assert any(text.rejected in document for document in texts)
        assert made.longer_is_chosen_accuracy() == 0.5


def test_template_changes_the_content(
    text_data: TextData, manifest: DatasetManifest, tokenizer_dir: Path, outputs: Path, votes: Path
) -> None:
    plain, chat = (
        prepare_preferences(
            preference_data_of(text_data, votes, template), manifest, tokenizer_dir, outputs, silent, 200
        )
        for template in ("plain", "chat")
    )
    assert plain.content_sha256 != chat.content_sha256
    assert {split: c.num_documents for split, c in plain.splits.items()} == {
        split: c.num_documents for split, c in chat.splits.items()
    }


def test_bad_records_stop_the_tokenizers_training_and_leave_the_report_only(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(story(1))
    (tmp_path / "empty.txt").touch()
    outputs = tmp_path / "outputs"
    with pytest.raises(DataError, match="1 of 2 records are refused"):
        prepare_tokenizer(
            TrainedBPE(kind="bpe", vocab_size=310),
            text_data_of(f"{tmp_path}/*.txt", max_refused_share=0.1),
            outputs,
            silent,
        )
    (left,) = (path.name for path in (outputs / "tokenizers").iterdir() if not path.name.startswith("."))
    assert left.endswith(".refused.jsonl")
