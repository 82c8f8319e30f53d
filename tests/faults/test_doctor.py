"""`llmtrain doctor`: each fault is put into a real run, and found, with its place and the override that helps."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.cli.doctor import main as doctor
from llmtrain.cli.train import main as train
from llmtrain.data.splits import split_of
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.doctor.examine import examine
from llmtrain.doctor.opened import open_run
from llmtrain.doctor.rescore import Judge, indices_of
from llmtrain.doctor.rows import Names, steps_of
from llmtrain.telemetry import vitals
from llmtrain.training.batches import MicroBatch, StepBatch, TextSteps
from llmtrain.training.module import CrossEntropy, TokenClock
from tests.faults.commands import SMALL
from tests.faults.runs import PRETRAIN_NAME

STEP_TOKENS = 256
NOTES = [f"Note {n}: the sum of {n} and one is {n + 1}, as everybody knows who can count to {n + 2}. " * 6
         for n in range(60)]  # fmt: skip
RUN = [*SMALL, "trainer.log_every_tokens=1_024", "trainer.sample_tokens=0",
       "data=text_files", "data.corpus.paths=[notes/*.txt]",
       "data.corpus.licence=CC0-1.0", "data.validation_share=0.1", "data.test_share=0.1"]  # fmt: skip


@pytest.fixture
def notes(trained: Path) -> Path:
    """The working directory, with a tracking database and a corpus that is soon learnt."""
    (trained / "notes").mkdir()
    for number, text in enumerate(NOTES):
        (trained / "notes" / f"{number:02}.txt").write_text(text)
    return trained


@pytest.fixture
def examined(notes: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Path, list[dict]]]:
    """Call it with a number of steps and overrides: a run, its exit code checked, is trained and examined.

    Returns the run's directory and the findings.
    """

    def train_and_examine(num_steps: int, *overrides: str, ends: int = 0) -> tuple[Path, list[dict]]:
        before = set((notes / "outputs" / PRETRAIN_NAME).iterdir())
        assert train([*RUN, f"trainer.budget_tokens={num_steps * STEP_TOKENS}", *overrides]) == ends
        (run,) = set((notes / "outputs" / PRETRAIN_NAME).iterdir()) - before
        capsys.readouterr()
        code = doctor(["--json", str(run)])
        found = json.loads(capsys.readouterr().out)
        assert code == (3 if found["findings"] else 0)
        return run, found["findings"]

    return train_and_examine


def the(kind: str, findings: list[dict]) -> dict:
    """The only finding of a kind; a machine that is busy with other things may give others beside it."""
    (found,) = (one for one in findings if one["kind"] == kind)
    return found


def at_step(step: int, act: Callable[[TokenClock], None]) -> Callable:
    """A training step that does `act` before step `step`."""
    original = TokenClock.training_step

    def training_step(module: TokenClock, batch, batch_idx: int) -> None:
        if module.step == step - 1:
            act(module)
        original(module, batch, batch_idx)

    return training_step


def test_nothing_is_found_in_a_healthy_run(examined, capsys):
    run, findings = examined(40)
    assert findings == []
    assert doctor([str(run)]) == 0
    said = capsys.readouterr().out
    assert "finished, 40 steps, 10,240 tokens\n\nnothing found\nlooked at:\n  waiting for data: " in said
    assert "losses of 40 steps: 0 above 8 robust deviations" in said
    rows = vitals.read(run / "vitals.jsonl")
    assert [row.step for row in rows] == list(range(4, 41, 4))
    assert [row.first_of_process for row in rows] == [True] + [False] * 9


def test_a_data_set_that_is_slow_is_a_data_stall(examined, monkeypatch):
    read = TextSteps.__getitem__

    def slow(steps: TextSteps, step: int):
        time.sleep(0.06)
        return read(steps, step)

    monkeypatch.setattr(TextSteps, "__getitem__", slow)
    _, findings = examined(12)
    finding = the("data stall", findings)
    assert finding["facts"]["seconds_a_step"] >= 0.06
    assert finding["facts"]["seconds"] >= 12 * 0.06
    assert 0.15 < finding["cost_share"] < 1
    assert finding["remedies"][0].startswith("outputs_dir=")


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a compiler of C++: graphs are made, and guarded, as with one."""
    torch._dynamo.reset()
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **named: compile_(self, backend="eager", **named))


def test_rows_that_are_filled_up_are_padding(examined, monkeypatch):
    """A step's 256 tokens in rows of 640: 384 of 640 are padding; rows of 256 would have none."""
    eager(monkeypatch)
    _, findings = examined(8, "infra.compile=true", "infra.micro_batch_tokens=600", "trainer.sample_tokens=9")
    finding = the("padding", findings)
    assert all(one["kind"] != "recompiles" for one in findings), "samples, which grow, are not compiled"
    assert finding["facts"] == {"share": 0.6, "row_tokens": 640}
    assert finding["remedies"] == [
        "infra.micro_batch_tokens=256 leaves 0% padding",
        "infra.compile=false needs no padding",
    ]


def test_rows_of_many_shapes_are_compiled_again_and_again(examined, monkeypatch):
    """Each row holds a document of its own length, too long for the micro-batch that rows are filled up to."""
    eager(monkeypatch)
    for number in range(40):
        Path(f"notes/{number:02}.txt").write_text((3 * NOTES[number])[: 650 + 12 * number])
    shape = ("trainer.packing=documents", "trainer.sequence_tokens=256", "trainer.batch_rows=1")
    run, findings = examined(16, "infra.compile=true", "infra.micro_batch_tokens=20", *shape)
    finding = the("recompiles", findings)
    reasons = [row.compile_reasons for row in vitals.read(run / "vitals.jsonl")]
    assert finding["facts"]["recompiles"] == sum(sum(row.values()) for row in reasons) > 4
    assert "size mismatch at index 1" in finding["details"][0]
    assert finding["remedies"][0].startswith("infra.micro_batch_tokens=256 pads all rows to one shape")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_read_of_the_gpu_in_each_micro_batch_is_found_with_its_place(examined, monkeypatch):
    """Ten reads in each of a step's four micro-batches."""
    loss = CrossEntropy.loss

    def reading(module: CrossEntropy, micro_batch: MicroBatch, step: StepBatch) -> torch.Tensor:
        found = loss(module, micro_batch, step)
        for _ in range(10):
            found.item()
        return found

    monkeypatch.setattr(CrossEntropy, "loss", reading)
    _, findings = examined(12, "infra=local_gpu", "infra.compile=false", "infra.micro_batch_tokens=64")
    finding = the("host syncs", findings)
    assert finding["facts"]["micro_batches_a_step"] == 4
    assert finding["facts"]["syncs_a_step"] >= 40
    assert "test_doctor.py" in finding["details"][0]


def test_a_weight_that_is_no_number_is_named_with_its_layer(examined, monkeypatch, capsys):
    layer = "model.layers.1.mlp.down_proj"

    def spoil(module: TokenClock) -> None:
        module.model.get_submodule(layer).weight.data[3, 5] = torch.nan

    monkeypatch.setattr(TokenClock, "training_step", at_step(7, spoil))
    run, findings = examined(12, ends=3)
    finding = the("not finite", findings)
    sickness = json.loads((run / "sickness.json").read_text())
    assert (sickness["step"], sickness["tokens"], sickness["loss"]) == (7, 7 * STEP_TOKENS, "NaN")
    origin = sickness["origin"]
    assert (origin["direction"], origin["layer"], origin["weight"]) == ("forward", layer, "weight")
    assert origin["micro_batch"] == 1
    assert len(origin["rows"]) == 4
    assert f"the forward pass first fails at {layer}, whose weight holds values" in finding["seen"]
    assert all(detail.startswith("row ") for detail in finding["details"][:3])
    doctor([str(run)])
    assert "stopped at step 7" in capsys.readouterr().out


def test_a_poisoned_token_is_named_with_its_document(examined, monkeypatch):
    """The embedding of the tokens that one document alone has is infinite."""
    text = NOTES[7].replace("sum", "s\N{SNOWMAN}m")
    assert split_of(text, 0, 0.1, 0.1) == "train"
    Path("notes/07.txt").write_text(text)

    def spoil(module: TokenClock) -> None:
        tokenizers = [path for path in Path("outputs/tokenizers").iterdir() if path.is_dir()]
        tokenizer = load_tokenizer(max(tokenizers, key=lambda path: path.stat().st_mtime))
        own = set(tokenizer.encode(text)) - set(tokenizer.encode("".join(NOTES)))
        module.model.get_input_embeddings().weight.data[list(own)] = torch.inf

    monkeypatch.setattr(TokenClock, "training_step", at_step(2, spoil))
    _, findings = examined(40, "model.tie_word_embeddings=false", ends=3)
    finding = the("not finite", findings)
    origin = finding["facts"]["origin"]
    assert (origin["direction"], origin["layer"], origin["weight"]) == ("forward", "model.embed_tokens", "weight")
    assert finding["details"][0].startswith("first at token ")
    assert "of notes/07.txt: Note 7: the s\N{SNOWMAN}m" in finding["details"][0]


def test_a_gradient_that_is_no_number_is_named_with_its_layer(examined, monkeypatch):
    layer = "model.layers.0.mlp.up_proj"

    def spoil(module: TokenClock) -> None:
        def infinite(projection, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * torch.inf)

        module.model.get_submodule(layer).register_forward_hook(infinite)

    monkeypatch.setattr(TokenClock, "training_step", at_step(3, spoil))
    _, findings = examined(8, ends=3)
    finding = the("not finite", findings)
    origin = finding["facts"]["origin"]
    assert (origin["direction"], origin["layer"]) == ("backward", layer)
    assert "gradient norm nan" in finding["seen"]


def test_a_document_of_noise_is_named_as_the_cause_of_a_spike(examined):
    noise = random.Random(0)
    while True:
        text = "".join(chr(noise.randrange(33, 126)) for _ in range(300))
        if split_of(text, 0, 0.1, 0.1) == "train":
            break
    Path("notes/30.txt").write_text(text)
    _, findings = examined(90, "trainer.lr=1e-2")
    spikes = [finding for finding in findings if finding["kind"] == "loss spike"]
    assert spikes
    for spike in spikes:
        assert "nats a token over" in spike["details"][0]
        assert f"notes/30.txt: {text[:20]}" in spike["details"][0]
        assert spike["remedies"][0] == "data.corpus.paths: leave notes/30.txt out, or correct it"


def test_a_run_that_is_none_or_has_nothing_yet_is_told_from_a_damaged_one(examined, capsys):
    run, _ = examined(8)

    def says(path: str | Path, code: int) -> str:
        assert doctor([str(path)]) == code
        return capsys.readouterr().err

    assert "nowhere: no such directory; give a run's directory" in says("nowhere", 2)
    assert "no frozen config to start from" in says("notes", 2)
    assert "wants one run's directory" in says("--json", 2)
    (run / "vitals.jsonl").write_text((run / "vitals.jsonl").read_text() + "{}\n")
    assert "vitals.jsonl:3: not a row of vitals (Field required)" in says(run, 3)
    rows = (run / "vitals.jsonl").read_text().splitlines(keepends=True)
    (run / "vitals.jsonl").write_text(rows[1] + rows[0])
    assert "begins with step 1, after step 8: rows are missing or there twice" in says(run, 3)
    (run / "vitals.jsonl").unlink()
    assert "wrote no vitals.jsonl: there is nothing to look at" in says(run, 2)
    (run / "metrics.jsonl").unlink()
    assert "has no step to look at yet: the first row of vitals.jsonl comes after" in says(run, 75)
    (run / "sickness.json").write_text("{")
    assert "sickness.json does not hold Sickness" in says(run, 3)
    (run / "config.json").write_text("{}")
    assert "is not a frozen config of this version" in says(run, 2)


TUNE = [*SMALL, "trainer.sequence_tokens=128", "trainer.sample_tokens=0", "trainer.epochs=1",
        "trainer.log_every_tokens=1",
        "data.corpus={kind: files, paths: ['text/*.txt'], licence: CC0-1.0}"]  # fmt: skip
PAIRS = "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 8}"


@pytest.mark.parametrize(
    "command",
    [
        [*RUN, "trainer.budget_tokens=1_536"],
        [*RUN, "trainer.budget_tokens=1_536", "trainer.packing=documents", "trainer.log_every_tokens=1"],
        [*TUNE, "trainer=dpo", PAIRS],
        [*TUNE, "trainer=dpo", "adapter=lora", "adapter.dropout=0", PAIRS],
        [*TUNE, "trainer=dpo", "trainer.loss=kto", PAIRS],
        [*TUNE, "trainer=sft", "data=chat_jsonl", "data.chats.paths=[chats.jsonl]", "data.chats.licence=CC0-1.0"],
    ],
    ids=["stream", "documents", "dpo", "lora", "kto", "sft"],
)
def test_the_losses_of_a_steps_rows_add_up_to_its_loss(notes: Path, command: list[str]):
    """By the checkpoint right before it, and without dropout: the doctor sees each row as training saw it."""
    turns = [{"prompt": f"What is {n} and one?", "response": f"It is {n + 1}, as I have counted."} for n in range(200)]
    Path("chats.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    assert train([*command, "trainer.checkpoint_every_tokens=1"]) == 0
    directory = max(notes.glob("outputs/qwen3_tiny-*/*/version.json"), key=lambda path: path.stat().st_mtime).parent
    run = open_run(directory)
    names = Names(steps_of(run.frozen, run.inputs(), run.outputs, run.frozen.config.infra), run.inputs(), run.outputs)
    indices = indices_of(names.steps, run.last_step)
    scored, checkpoint = Judge(run, run.inputs()).scored(names, indices, run.last_step)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{run.last_step - 1:08}"
    mean = sum(one.loss * one.count for one in scored) / sum(one.count for one in scored)
    assert mean == pytest.approx(run.rows[-1].losses[-1], rel=1e-5)
    assert all(one.member.name and one.member.text for one in scored)


def test_a_run_is_examined_while_it_trains(examined, monkeypatch):
    seen = []

    def look(module: TokenClock) -> None:
        newest = max(Path("outputs", PRETRAIN_NAME).iterdir(), key=lambda path: path.stat().st_mtime)
        seen.append(examine(newest))

    monkeypatch.setattr(TokenClock, "training_step", at_step(10, look))
    examined(12)
    (live,) = seen
    assert live.state.startswith("not finished: step 8, 2,048 tokens, as of 0 s ago")
    assert [one.kind for one in live.findings if one.kind != "data stall"] == [], "but for what a busy machine does"
