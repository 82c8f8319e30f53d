"""Tiny runs of every kind, made once, and what they read of the config."""

import dis
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

import llmtrain
from llmtrain.cli.train import main
from llmtrain.config.base import Settings

Read = tuple[type[Settings], str]
"""A schema's class and one of its fields."""

PACKAGE = str(Path(llmtrain.__file__).parent)
NO_READERS = tuple(str(Path(PACKAGE, name)) for name in ("config", "plan", "training/planned.py"))
BY_NAME = ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS")
"""The instructions that `config.trainer.lr` and `case DPOTrainer(lr=lr)` become; `getattr` in a loop is a call."""

TINY = (
    "model=qwen3_tiny",
    "model.vocab_size=640",
    "infra.precision=fp32",
    "infra.threads=1",
    "trainer.sequence_tokens=64",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=300",
    "trainer.log_every_tokens=256",
    "trainer.evaluate_every_tokens=512",
    "trainer.checkpoint_every_tokens=512",
    "data.validation_share=0.2",
    "data.test_share=0.2",
)
FILES = "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}"
PRETRAIN = (*TINY, "trainer.budget_tokens=1_024", "trainer.lr=4.0e-3")  # 4 steps of 256 tokens
MUON = "trainer.optimizer=muon"
OTHERWISE = ("trainer.packing=documents", MUON, "trainer.schedule=wsd")
BASE = (*PRETRAIN, "data=text_files", FILES)
DPO = (*TINY, "trainer=dpo", "trainer.sequence_tokens=128")
TUNED = (
    *DPO,
    FILES,
    "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 12}",
    "tracking=none",
)
ANEW = ("data.split_seed=1", "tracking=none")
"""Another split: nothing that was prepared before fits."""
PAIRS = ("data=preference_jsonl", "data.pairs.paths=[pairs.jsonl]", "data.pairs.licence=MIT")
VOTES = ("trainer=kto", "data=votes_jsonl", "data.pairs.paths=[votes.jsonl]", "data.pairs.licence=MIT")
CHATS = ("data=chat_jsonl", "data.chats.paths=[chats.jsonl]", "data.chats.licence=MIT")
SFT = (*TINY, "trainer=sft", "trainer.sequence_tokens=128", "trainer.epochs=1")
ASKED = "data.chats={kind: docstring_chats, max_answer_characters: 80, max_training_chats: 20}"


@dataclass(frozen=True)
class Runs:
    """What finished runs left behind, and what they read of their config."""

    directory: Path
    """The working directory; it has `outputs`."""
    reads: dict[str, set[Read]]
    """By the name of the run."""


@contextmanager
def recorded_reads() -> Iterator[set[Read]]:
    """The settings that code of the package, outside `llmtrain.config`, reads by name while the block runs.

    What the config's own code does with a setting (rules, hashes, copies), what a plan reckons with, what pydantic
    dumps, and a loop over all fields is no reading.
    """
    found: set[Read] = set()
    read = Settings.__getattribute__

    def recording(self: Settings, name: str) -> Any:
        if name in type(self).model_fields:
            frame = sys._getframe(1)
            file = frame.f_code.co_filename
            instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if file.startswith(PACKAGE) and not file.startswith(NO_READERS) and instruction in BY_NAME:
                found.add((type(self), name))
        return read(self, name)

    Settings.__getattribute__ = recording
    try:
        yield found
    finally:
        del Settings.__getattribute__


def write_sources(directory: Path) -> None:
    """`text/*.txt`, the same as `text.jsonl`, `pairs.jsonl`, and of each two votes and a chat."""
    texts = [text[:1500] for text in sorted(topics.values(), key=len, reverse=True)[:30]]
    (directory / "text").mkdir()
    for number, text in enumerate(texts):
        (directory / "text" / f"{number:02}.txt").write_text(text)
    (directory / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pairs, votes, chats = [], [], []
    for number in range(30):
        prompt, chosen, rejected = f"What is {number} and one?", f"It is {number + 1}.", f"Not {number}, I hope."
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        votes += [{"prompt": prompt, "completion": text, "label": text == chosen} for text in (chosen, rejected)]
        chats.append({"prompt": prompt, "response": chosen})
    for name, rows in (("pairs", pairs), ("votes", votes), ("chats", chats)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def the_run(directory: Path, name: str) -> Path:
    """The directory of the one run of that name."""
    (run,) = (path for path in (directory / "outputs" / name).iterdir() if path.is_dir())
    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run for each kind that has settings of its own; a kind without one fails `test_every_key_is_read`."""
    directory = tmp_path_factory.mktemp("runs")
    write_sources(directory)
    base = directory / "outputs" / "base"
    reads: dict[str, set[Read]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.delenv("COMET_API_KEY", raising=False)

        def run(name: str, *overrides: str) -> None:
            with recorded_reads() as reads[name]:
                assert main([f"name={name}", *overrides]) == 0, name

        run("base", *BASE, "tracking=mlflow_comet")
        run("tuned", *TUNED)
        (base,) = base.glob("*/")
        start = f"trainer.init_from={base}"
        run("chat", *DPO, *PAIRS, "data.pairs.template=chat", FILES, start, *ANEW, "trainer.loss=simpo", MUON)
        run("votes", *DPO, *VOTES, FILES, start, *ANEW)
        run("lines", *lines(base))
        run("asked", *SFT, FILES, ASKED, "data.max_refused_share=1.0", start, *ANEW, MUON)
        published = ("model=hf", "model.name=published", f"model.path={base}/model", "adapter=lora", "adapter.rank=2")
        without_shape = [override for override in SFT if not override.startswith("model")]
        run("published", *without_shape, *CHATS, FILES, *published, *ANEW)
        teacher = ("trainer=distill", f"trainer.teacher={base}", "data=text_files", FILES)
        run("student", *PRETRAIN, *teacher, "tracking=none", MUON)
    return Runs(directory, reads)


def lines(base: Path) -> tuple[str, ...]:
    """A run on JSON lines with the tokenizer of the run `base`."""
    corpus = "data.corpus={kind: jsonl, paths: [text.jsonl], text_field: body, licence: PSF-2.0}"
    return (
        *PRETRAIN,
        *OTHERWISE,
        "data=text_jsonl",
        corpus,
        f"model.tokenizer={{kind: hf, path: {base}/model}}",
        "tracking=none",
    )
