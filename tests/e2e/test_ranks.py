"""Two ranks give the result of one, under each strategy; they stop and go on, and become more or fewer.

All two-rank runs share one pair of processes (rank_driver.py), started by torchrun itself. What is `LONGER` runs with
scripts/test-full: one of each family of strategies is enough for every day.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import thaw
from llmtrain.errors import IntegrityError, TryAgain, UserError
from llmtrain.telemetry.metrics import read
from llmtrain.training import checkpoints
from llmtrain.training.events import Between
from llmtrain.training.run import train
from tests.faults.runs import text

pytestmark = pytest.mark.timeout(2400)  # the first test waits for all runs

STRATEGIES = ("ddp", "fsdp2", "tensor_parallel", "deepspeed_zero2", "deepspeed_zero3")
LONGER = ("tensor_parallel", "deepspeed_zero3")
ELASTIC = ("ddp", "fsdp2", "tensor_parallel")
SMALL = (
    "model=qwen3_tiny",
    "infra.precision=fp32",
    "infra.threads=1",
    "infra.micro_batch_tokens=100",  # of 256 to 400 a step: several micro-batches for each rank
    "tracking=none",
    "trainer.batch_rows=6",
    "trainer.lr=1e-3",
    "trainer.warmup_tokens=500",
    "trainer.log_every_tokens=1",
    "trainer.evaluate_every_tokens=1_000",
    "trainer.checkpoint_every_tokens=500",
    "trainer.sample_tokens=2",
)
PRETRAIN = ("trainer=pretrain", "trainer.sequence_tokens=48", "trainer.budget_tokens=2_592")  # 9 steps
DPO = (
    "trainer=dpo",
    "trainer.epochs=1",
    "trainer.sequence_tokens=96",
    "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 50}",
)  # 9 steps, the last of two pairs: with two ranks a pair each
SFT = (
    "trainer=sft",
    "trainer.epochs=1",
    "trainer.sequence_tokens=256",
    "trainer.batch_rows=4",
    "infra.micro_batch_tokens=256",
    "data.chats={kind: docstring_chats, max_answer_characters: 80, max_training_chats: 90}",
    "data.max_refused_share=0.2",
)
OTHERS = {
    "sft": SFT,
    "kto": (*DPO, "trainer=kto"),
    "distill": ("trainer=distill", *PRETRAIN[1:], "trainer.teacher={pretrain}"),
    "dpo-lora": (*DPO, "adapter=lora"),
}
"""The other trainers and the adapter, each under both of `FOR_OTHERS`."""
FOR_OTHERS = ("ddp", "fsdp2")
DATA = "data.corpus={{kind: files, paths: ['{}/text/*.txt'], licence: PSF-2.0}}"


class Runs:
    """The outputs of this file's runs: one-rank ones made in this process, the others by a pair of ranks."""

    def __init__(self, place: Path, wanted: set[tuple[str, str]]) -> None:
        """Those that the tests in `wanted` look at: strategy, and kind or ""."""
        self.outputs, self.place = place / "outputs", place
        strategies = [strategy for strategy in STRATEGIES if strategy in {one for one, _ in wanted}]
        text(place, num_documents=24, characters=2000)
        self.alone("pretrain", PRETRAIN)
        self.alone("dpo", (*DPO, f"trainer.init_from={self.directory('pretrain')}"))
        pretrained = self.directory("pretrain")
        for name, overrides in OTHERS.items():
            start = () if name == "distill" else (f"trainer.init_from={pretrained}",)
            self.alone(name, (*(line.replace("{pretrain}", str(pretrained)) for line in overrides), *start))
        (place / "torch_extensions").mkdir()
        plan: list[dict[str, Any]] = []
        for strategy in strategies:
            plan += [self.pair(f"{strategy}-pretrain", "pretrain", strategy)]
            plan += [self.pair(f"{strategy}-dpo", "dpo", strategy)]
            plan += [self.pair(f"{strategy}-stopped", "pretrain", strategy, stop=[1, 3])]
            plan += [self.pair(f"{strategy}-stopped", "pretrain", strategy)]
        plan += [self.pair(f"{strategy}-{kind}", kind, strategy) for strategy in FOR_OTHERS for kind in OTHERS
                 if (strategy, kind) in wanted]  # fmt: skip
        if "deepspeed_zero3" in strategies:
            plan += [self.pair("offload-pretrain", "pretrain", "deepspeed_zero3", offload=True)]
        elastic = [strategy for strategy in ELASTIC if strategy in strategies]
        for strategy in elastic:
            self.alone(f"{strategy}-elastic", PRETRAIN, stop=3)
            plan += [self.pair(f"{strategy}-elastic", "pretrain", strategy, stop=[0, 6], micro_batch_tokens=150)]
        self.ended = dict(zip([(e["name"], bool(e["stop"])) for e in plan], self.ranks(plan), strict=True))
        for strategy in elastic:
            self.alone(f"{strategy}-elastic", PRETRAIN)

    def directory(self, name: str) -> Path:
        [directory] = (self.outputs / name).iterdir()
        return directory

    def alone(self, name: str, overrides: tuple[str, ...], stop: int | None = None) -> None:
        """Run on one rank; it is sent SIGTERM when it has done `stop` steps."""
        data = DATA.format(self.place)
        config = load_config([*SMALL, *overrides, data, f"name={name}", f"outputs_dir={self.outputs}"])
        with stopping_at(stop):
            try:
                train(config, base_config=lambda: config, say=lambda line: None)
            except TryAgain:
                assert stop is not None

    def pair(
        self, name: str, like: str, strategy: str, stop: list[int] | None = None, **infra: int | bool
    ) -> dict[str, Any]:
        """An entry of the plan: the frozen run `like`, for two ranks, under another name."""
        source = self.directory(like)
        frozen = thaw(source / "config.json")
        changed = frozen.config.infra.model_copy(update={"ranks": 2, "strategy": strategy, **infra})
        config = frozen.config.model_copy(update={"name": name, "infra": changed})
        directory = self.outputs / name / source.name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(frozen.model_copy(update={"config": config}).model_dump_json())
        return {"name": name, "directory": str(directory), "stop": stop}

    def ranks(self, plan: list[dict[str, Any]]) -> list[str]:
        """What each entry of `plan` ended with, done by two ranks."""
        file = self.place / "plan.json"
        file.write_text(json.dumps(plan))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(self.place / "torch_extensions"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        driver = str(Path(__file__).with_name("rank_driver.py"))
        done = subprocess.run(
            [*torchrun, "--max-restarts=0", driver, str(file)],
            env=environment, cwd=self.place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1700,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        ended: list[str] = json.loads(file.with_suffix(".ended").read_text())
        return ended

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read(self.directory(name) / "metrics.jsonl")

    def state(self, name: str) -> dict[str, Any]:
        newest = checkpoints.newest(self.directory(name) / "checkpoints")
        assert newest is not None
        state: dict[str, Any] = torch.load(newest / "state.pt", weights_only=True)
        return state


class stopping_at:  # noqa: N801
    """A context in which a run is sent SIGTERM when it has done so many steps."""

    def __init__(self, step: int | None) -> None:
        self.step, self.undisturbed = step, Between.on_train_batch_end

    def __enter__(self) -> None:
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def after_step(between: Between, trainer: Any, module: Any, *rest: Any) -> None:
            if module.step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            self.undisturbed(between, trainer, module, *rest)

        Between.on_train_batch_end = after_step  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Between.on_train_batch_end = self.undisturbed  # type: ignore[method-assign]
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    threads = torch.get_num_threads()
    here = [item.callspec.params for item in request.session.items
            if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    wanted = {("fsdp2", "")}  # the last tests look at it
    wanted |= {(str(params["strategy"]), str(params.get("kind", ""))) for params in here}
    yield Runs(tmp_path_factory.mktemp("ranks"), wanted)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Over loss and gradient norm of each step, relative."""
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    figures = ("train/loss", "train/grad_norm")
    pairs = [(one[name], other[name]) for one, other in zip(ours, theirs, strict=True) for name in figures]
    return max(abs(one / other - 1) for one, other in pairs)


def cases(*values: tuple[str, ...]) -> list[Any]:
    """As parameters; those of a strategy in `LONGER`, and of the other trainers under the second one, take longer."""
    longer = [value for value in values if value[0] in LONGER or (value[0] != "ddp" and value[-1] in OTHERS)]
    return [pytest.param(*value, marks=pytest.mark.campaign if value in longer else ()) for value in values]


ALL = cases(
    *((strategy, kind) for strategy in STRATEGIES for kind in ("pretrain", "dpo")),
    *((strategy, kind) for strategy in FOR_OTHERS for kind in OTHERS),
)


@pytest.mark.parametrize(("strategy", "kind"), ALL)
def test_two_ranks_give_the_curve_of_one(runs: Runs, strategy: str, kind: str):
    one, two = runs.rows(kind), runs.rows(f"{strategy}-{kind}")
    assert len(one) >= 8
    assert largest_difference(two, one) < 1e-5
    for row, other in zip(two, one, strict=True):
        for name in other.keys() & {"validation/loss", "validation/heldout_loss", "validation/margin"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


@pytest.mark.campaign
@pytest.mark.parametrize("strategy", ["deepspeed_zero3"])
def test_an_offloaded_optimizer_and_weights_change_nothing(runs: Runs, strategy: str):
    assert largest_difference(runs.rows("offload-pretrain"), runs.rows("pretrain")) < 1e-5


@pytest.mark.parametrize(("strategy", "kind"), ALL)
def test_the_exported_model_is_whole_tied_and_the_one_rank_one_within_rounding(runs: Runs, strategy: str, kind: str):
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(runs.directory(name) / "model") for name in (f"{strategy}-{kind}", kind)
    )
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    names = theirs.state_dict().keys()
    assert ours.state_dict().keys() == names
    for name in names:
        one, other = ours.state_dict()[name], theirs.state_dict()[name]
        assert (one - other).norm() <= 1e-4 * other.norm(), name
    tested = json.loads((runs.directory(f"{strategy}-{kind}") / "trained.json").read_text())["metrics"]
    expected = json.loads((runs.directory(kind) / "trained.json").read_text())["metrics"]
    assert tested["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", cases(*((strategy,) for strategy in STRATEGIES)))
def test_a_signal_to_any_rank_stops_all_and_the_run_goes_on_bit_for_bit(runs: Runs, strategy: str):
    ended = runs.ended[f"{strategy}-stopped", True]
    assert ended.startswith("TryAgain")
    assert "is saved at step 3" in ended
    stopped, whole = (runs.rows(f"{strategy}-{name}") for name in ("stopped", "pretrain"))
    figures = ("step", "train/loss", "train/grad_norm")
    assert [[row[name] for name in figures] for row in stopped] == [[row[name] for name in figures] for row in whole]
    hashes = [
        json.loads((runs.directory(f"{strategy}-{name}") / "trained.json").read_text())["weights_sha256"]
        for name in ("stopped", "pretrain")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("strategy", cases(*((strategy,) for strategy in ELASTIC)))
def test_one_rank_then_two_then_one_see_the_same_data_in_the_same_order(runs: Runs, strategy: str):
    """Steps 1 to 3 on one rank, 4 to 6 on two with other micro-batches, the rest on one."""
    assert "is saved at step 6" in runs.ended[f"{strategy}-elastic", True]
    assert largest_difference(runs.rows(f"{strategy}-elastic"), runs.rows("pretrain")) < 1e-5
    orders = {runs.state(name)["clock"]["order_sha256"] for name in ("pretrain", f"{strategy}-elastic")}
    assert len(orders) == 1


@pytest.mark.parametrize("strategy", cases(("deepspeed_zero2",), ("deepspeed_zero3",)))
def test_what_deepspeed_saved_is_refused_elsewhere_with_the_override_that_reads_it(runs: Runs, strategy: str, tmp_path):
    name = f"{strategy}-moved"
    copy = runs.outputs / name / runs.directory("pretrain").name
    shutil.copytree(runs.directory(f"{strategy}-pretrain"), copy, symlinks=True)
    (copy / "version.json").unlink()
    with pytest.raises(UserError, match=rf"infra.strategy={strategy} infra.ranks=2"):
        runs.alone(name, PRETRAIN)


def test_each_rank_wrote_its_shards_and_a_damaged_one_is_passed_over(runs: Runs, tmp_path):
    shutil.copytree(runs.directory("fsdp2-pretrain") / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    newest = checkpoints.newest(tmp_path / "checkpoints")
    assert newest is not None
    shards = sorted(path.name for path in (newest / "shards").glob("*.distcp"))
    assert {name.split("_")[2] for name in shards} == {"0", "1"}
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {f"shards/{name}" for name in shards} | {"state.pt", "shards/.metadata"} == manifest.keys()
    content = bytearray((newest / "shards" / shards[1]).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "shards" / shards[1]).write_bytes(content)
    with pytest.raises(IntegrityError):
        checkpoints.verify(newest)
    assert checkpoints.newest(tmp_path / "checkpoints") != newest


def test_only_rank_0_writes(runs: Runs):
    journal = [json.loads(line) for line in (runs.outputs / "journal.jsonl").read_text().splitlines()]
    kinds = [entry["kind"] if "kind" in entry else entry["event"] for entry in journal]
    started, finished = kinds.count("run.started"), kinds.count("run.finished")
    names = [path.name for path in runs.outputs.iterdir() if list(path.glob("*/version.json"))]
    assert started == finished == len(names)
    ours, theirs = (
        {path.relative_to(runs.directory(name)).as_posix() for path in runs.directory(name).glob("*")}
        for name in ("fsdp2-dpo", "dpo")
    )
    assert ours == theirs
