"""What a key changes is seen where it should be: in the run id, in a run's rows, weights and data, in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from llmtrain.artifacts import DatasetManifest, TrainedModel
from llmtrain.cli.train import main
from llmtrain.config.base import Changes, Settings, content_hash
from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, Resolved, thaw
from llmtrain.telemetry.metrics import read
from llmtrain.training import device
from llmtrain.training.checkpoints import step_of
from tests.conf.conftest import BASE, TUNED, Runs, the_run

CONFIGS = {
    "pretraining": [],
    "tuning": ["trainer=dpo"],
    "a published tokenizer, text files": [
        "model=qwen3_0_6b",
        "data=text_files",
        "data.corpus.paths=[a]",
        "data.corpus.licence=b",
    ],
    "JSON lines": ["data=text_jsonl", "data.corpus.paths=[a]", "data.corpus.licence=b"],
    "preferences of one's own": [
        "trainer=dpo",
        "data=preference_jsonl",
        "data.pairs.paths=[a]",
        "data.pairs.licence=b",
    ],
    "every tracker": ["tracking=mlflow_comet"],
    "chats, low-rank": ["trainer=sft", "adapter=lora"],
    "chats of one's own, 4 bits": [
        "trainer=sft",
        "data=chat_jsonl",
        "data.chats.paths=[a]",
        "data.chats.licence=b",
        "adapter=qlora",
        "infra=local_gpu",
    ],
    "votes": ["trainer=kto", "data=votes_jsonl", "data.pairs.paths=[a]", "data.pairs.licence=b"],
    "a teacher": ["trainer=distill", "trainer.teacher=a"],
    "a published model": ["model=hf", "model.name=a", "model.path=b", "trainer=sft"],
    "a packaged model": ["model=smollm2_135m", "trainer=sft"],
}
RESOLVED = Resolved(**dict.fromkeys(Resolved.model_fields, "x"))


def changed_once(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Changes, Settings]]:
    """For each key: its name, what it says it changes, and the settings with another value there."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            for key, changes, inner in changed_once(value, f"{prefix}{name}."):
                yield key, changes, settings.model_copy(update={name: inner})
        else:
            (changes,) = [item for item in field.metadata if isinstance(item, Changes)]
            yield prefix + name, changes, settings.model_copy(update={name: another(value)})


def another(value: Any) -> Any:
    match value:
        case None:
            return 1
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return f"{value}_"
        case tuple():
            return (*value, "more")


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_the_run_id_depends_on_the_mathematics_and_the_prepared_data_on_its_keys(overrides: list[str]):
    def identities(settings: Settings) -> tuple[str, str]:
        frozen = FrozenRun.model_construct(config=settings, resolved=RESOLVED, attempt=1)
        return frozen.run_id, content_hash(settings.fields_that_change(Changes.DATA))

    config = load_config(overrides)
    run_id, data = identities(config)
    for key, changes, other in changed_once(config):
        other_run_id, other_data = identities(other)
        assert (other_run_id != run_id) == (changes is Changes.MATHEMATICS), key
        assert (other_data != data) == (changes is Changes.DATA), key


def test_what_leaves_the_run_id_of_the_network_the_trainer_and_the_precision():
    """A key that is new and should not be here fails this: two different runs would then be taken for one."""
    found = {
        key
        for overrides in CONFIGS.values()
        for key, changes, _ in changed_once(load_config(overrides))
        if changes is not Changes.MATHEMATICS and key.startswith(("model.", "trainer.", "infra.", "adapter."))
    }
    assert found == {
        "model.name", "model.tokenizer.kind", "model.tokenizer.path", "model.tokenizer.vocab_size",
        "trainer.init_from", "trainer.heldout_loss_warning_share", "trainer.log_every_tokens",
        "trainer.evaluate_every_tokens", "trainer.checkpoint_every_tokens", "trainer.sample_tokens",
        "infra.launch.kind", "infra.launch.parallel", "infra.launch.restarts",
        "infra.accelerator", "infra.threads", "infra.micro_batch_tokens", "infra.loss_chunk_tokens",
        "infra.deterministic", "infra.ranks", "infra.strategy", "infra.offload", "infra.attention", "infra.compile",
        "infra.loss_kernel", "infra.activation_checkpointing", "infra.hardware.kind", "infra.hardware.watts",
        "infra.hardware.price_per_hour", "infra.hardware.assumed_mfu",
        "model.path", "model.revision", "trainer.teacher",
    }  # fmt: skip


def run_with(runs: Runs, override: str, like: tuple[str, ...]) -> Path:
    """The directory of a run that differs from one of `runs` in one override; tuning starts from the same base."""
    name = f"{override.partition('=')[0]}-{crc32(override.encode()):08x}"
    start = [f"trainer.init_from={the_run(runs.directory, 'base')}"] if like == TUNED else []
    assert main([*like, *start, "tracking=none", f"name={name}", override]) == 0
    return the_run(runs.directory, name)


@pytest.fixture(autouse=True)
def _in_the_runs_directory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "runs" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("runs").directory)


def values(key: str) -> Callable[[Path], list[float]]:
    return lambda run: [row[key] for row in read(run / "metrics.jsonl") if key in row]


def steps_saved(run: Path) -> list[int]:
    return sorted(step_of(path) for path in (run / "checkpoints").glob("step-*"))


def first(key: str) -> Callable[[Path], float]:
    return lambda run: values(key)(run)[0]


def last(key: str) -> Callable[[Path], float]:
    return lambda run: values(key)(run)[-1]


def number_of(key: str) -> Callable[[Path], int]:
    return lambda run: len(values(key)(run))


def training_pairs(run: Path) -> int:
    path = thaw(run / "config.json").resolved.pairs_path
    return DatasetManifest.read(run.parents[1] / str(path) / "manifest.json").splits["train"].num_documents


def weights(run: Path) -> str:
    return TrainedModel.read(run / "trained.json").weights_sha256


SCHEDULE = {
    "trainer.lr=8.0e-3": (first("train/lr"), 4e-3 * 256 / 300, 8e-3 * 256 / 300),
    "trainer.warmup_tokens=512": (first("train/lr"), 4e-3 * 256 / 300, 4e-3 * 256 / 512),
    "trainer.min_lr_share=0.5": (last("train/lr"), 4e-3 * 0.1, 4e-3 * 0.5),
    "trainer.schedule=constant": (last("train/lr"), 4e-3 * 0.1, 4e-3),
    "trainer.budget_tokens=1_280": (last("tokens"), 1024, 1280),
    "trainer.batch_rows=2": (last("step"), 4, 8),
    "trainer.sequence_tokens=128": (last("step"), 4, 2),
}
"""What is seen of a run with this override: where, without it, with it."""


@pytest.mark.parametrize("override", SCHEDULE)
def test_the_schedule_of_pretraining(runs: Runs, override: str):
    seen, before, after = SCHEDULE[override]
    assert seen(the_run(runs.directory, "base")) == pytest.approx(before, rel=1e-12)
    assert seen(run_with(runs, override, BASE)) == pytest.approx(after, rel=1e-12)


SHOWN_AND_SAVED = {
    "trainer.log_every_tokens=512": (number_of("train/loss"), 4, 2),
    "trainer.evaluate_every_tokens=256": (number_of("validation/loss"), 2, 4),
    "trainer.checkpoint_every_tokens=256": (steps_saved, [2, 4], [3, 4]),
}


@pytest.mark.parametrize("override", SHOWN_AND_SAVED)
def test_what_is_shown_and_saved_leaves_the_weights_as_they_are(runs: Runs, override: str):
    seen, before, after = SHOWN_AND_SAVED[override]
    base, run = the_run(runs.directory, "base"), run_with(runs, override, BASE)
    assert (seen(base), seen(run)) == (before, after)
    assert weights(run) == weights(base)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.weight_decay=0.5",
        "trainer.adam_beta1=0.5",
        "trainer.adam_beta2=0.5",
        "trainer.adam_eps=1.0e-2",
        "trainer.max_grad_norm=1.0e-2",
        "trainer.optimizer=muon",
    ],
)
def test_the_optimizer_starts_from_the_same_loss_and_ends_elsewhere(runs: Runs, override: str):
    base, run = the_run(runs.directory, "base"), run_with(runs, override, BASE)
    assert first("train/loss")(run) == first("train/loss")(base)
    assert weights(run) != weights(base)


@pytest.mark.parametrize(
    "override", ["trainer.seed=1", "model.initializer_range=0.05", "data.split_seed=1", "trainer.packing=documents"]
)
def test_another_start_or_other_data_have_another_first_loss(runs: Runs, override: str):
    base, run = the_run(runs.directory, "base"), run_with(runs, override, BASE)
    assert first("train/loss")(run) != first("train/loss")(base)


PAIRS = {"trainer.epochs=2": (last("step"), 3, 6), "data.pairs.max_training_pairs=8": (training_pairs, 12, 8)}


@pytest.mark.parametrize("override", PAIRS)
def test_the_pairs_that_tuning_sees(runs: Runs, override: str):
    seen, before, after = PAIRS[override]
    assert seen(the_run(runs.directory, "tuned")) == before
    assert seen(run_with(runs, override, TUNED)) == after


def test_beta_scales_the_reward_and_not_the_loss_of_the_first_step(runs: Runs):
    tuned, run = the_run(runs.directory, "tuned"), run_with(runs, "trainer.beta=1.0", TUNED)
    assert first("train/loss")(run) == first("train/loss")(tuned) == pytest.approx(0.693147, abs=1e-5)
    assert first("train/grad_norm")(run) == pytest.approx(10 * first("train/grad_norm")(tuned), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "loss"),
    [
        ("trainer.loss=hinge", 1.0),  # of a margin of 0: 1 - 0
        ("trainer.loss=ipo", 25.0),  # (0 - 1 / (2 * 0.1))^2
        ("trainer.loss=apo_zero", 1.0),  # two sigmoids of 0
        ("trainer.loss=kto", 0.5),
    ],
)
def test_where_each_preference_loss_begins(runs: Runs, override: str, loss: float):
    assert first("train/loss")(run_with(runs, override, TUNED)) == pytest.approx(loss, abs=1e-4)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most rows of any tensor over the vocabulary, and the most ids that were embedded at once."""

    logits = ids = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (640,):
            self.logits = max(self.logits, out.numel() // 640)
        if function is torch.ops.aten.embedding.default:
            self.ids = max(self.ids, args[1].numel())
        return out


def test_micro_batches_and_chunks_bound_what_exists_at_once_and_leave_the_loss(runs: Runs):
    largest = {}
    for override in ("infra.micro_batch_tokens=128", "infra.loss_chunk_tokens=64"):
        with Largest() as largest[override]:
            run = run_with(runs, override, BASE)
        expected = values("train/loss")(the_run(runs.directory, "base"))
        assert values("train/loss")(run) == pytest.approx(expected, rel=1e-5)
    few, small = largest.values()
    assert (few.ids, small.ids) == (128, 4096)
    assert (few.logits, small.logits) == (128, 64)


def test_threads_and_determinism_are_those_of_the_process():
    num_threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for threads, refuses in ((2, False), (1, True)):
            device.apply(load_config([f"infra.threads={threads}", f"infra.deterministic={refuses}"]).infra)
            assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, refuses)
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(deterministic)
