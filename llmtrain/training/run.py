"""One run, from a checked config to a registered model. Read `train` from top to bottom: it is the whole story.

outputs/<name>/<run id>/config.json       the frozen config: what would make this run again
                        metrics.jsonl     a row each log interval; curves.png is drawn from it
                        clock.json        the steps and tokens that it will have at its end
                        baselines.json    what the last figures are held against, measured before training
                        samples/          held-out prompts continued at each evaluation; margins.json: of each pair
                        plan.json         memory and time as planned before the first step;
                        plan_vs_actual.json  and as measured, when training ended
                        report.html       all of it to look at, from the first step on; processes.json: machine, times
                        checkpoints/      what a restart continues from
                        model/            the finished model, as `from_pretrained` loads it
                        trained.json      its record; version.json: the registered one. With it, the run is over.
"""

import fcntl
import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from llmtrain.artifacts import ModelVersion, TrainedModel
from llmtrain.config.frozen import FrozenRun, thaw
from llmtrain.config.root import TrainConfig
from llmtrain.config.tracking import NoTracking
from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer
from llmtrain.data.prepared import verify
from llmtrain.errors import IntegrityError, Interrupted, NonFiniteLoss, TryAgain
from llmtrain.files import write_whole
from llmtrain.journal import Journal
from llmtrain.models import attention
from llmtrain.models.logprobs import check_log_probs
from llmtrain.models.start import starting_network
from llmtrain.plan import actual
from llmtrain.plan.machine import resident_bytes
from llmtrain.plan.make import refuse
from llmtrain.registry.registry import Registry
from llmtrain.report.baselines import levels
from llmtrain.telemetry.curves import plot_curves
from llmtrain.telemetry.metrics import MetricsFile, NoMetrics
from llmtrain.telemetry.progress import Progress
from llmtrain.telemetry.stopwatch import Stopwatch
from llmtrain.telemetry.tracking import Tracker, check_tracking, open_tracker
from llmtrain.training import checkpoints, device, tasks
from llmtrain.training.batches import steps_from
from llmtrain.training.diagnostics import warnings_of
from llmtrain.training.events import Between
from llmtrain.training.export import export
from llmtrain.training.measured import HeldAgainstPlan
from llmtrain.training.planned import planner
from llmtrain.training.ranks.alone import Alone
from llmtrain.training.ranks.group import join, strategy_of
from llmtrain.training.ranks.in_place import InPlace
from llmtrain.training.resolve import Inputs, Say, inputs_of, resolve
from llmtrain.training.traces import Traces


def train(
    config: TrainConfig,
    *,
    base_config: Callable[[], TrainConfig],
    again: bool = False,
    force: bool = False,
    say: Say = print,
) -> TrainedModel:
    """Train what `config` describes, or continue, or say that it is finished; returns the registered model's record.

    `base_config` composes the pretraining that `trainer.init_from=latest` needs where nothing is registered. `again`
    makes another run of the same mathematics; `force` begins one that will not fit by its plan. With more than one
    rank, this process prepares and freezes; the ranks are others, that begin with `train_rank`. Raises the errors of
    `llmtrain.errors`; what was saved stays.
    """
    outputs, stopwatch = Path(config.outputs_dir), Stopwatch()

    def train_base() -> TrainedModel:
        with stopwatch.phase("base model"):
            return train(base_config(), base_config=base_config, force=force, say=say)

    with stopwatch.phase("preparing"):
        frozen, inputs = frozen_run(config, train_base, again=again, say=say)
    directory = directory_of(frozen)
    many = config.infra.ranks > 1
    with only_process(directory, "launcher.lock" if many else "lock"):
        if version := finished(directory):
            say(f"{directory} is finished: {version.label} (--again makes another run)")
            return version.model
        freeze(frozen, force=force)
        if many:
            from llmtrain.training.ranks.torchrun import run_ranks

            run_ranks(directory, config.infra.ranks)
            return ModelVersion.read(directory / "version.json").model
        trained = _run(frozen, inputs, outputs, directory, stopwatch, Alone(), say)
        assert trained is not None, "the only process is rank 0"
        return trained


def frozen_run(
    config: TrainConfig, train_base: Callable[[], TrainedModel], *, again: bool = False, say: Say = print
) -> tuple[FrozenRun, Inputs]:
    """The run that `config` describes, data prepared and parents found; with `again` one that is not finished.

    Raises the errors of `llmtrain.errors`.
    """
    check_tracking(config.tracking)
    device.apply(config.infra)
    frozen, inputs = resolve(config, Path(config.outputs_dir), train_base, say)
    while again and finished(directory_of(frozen)):
        frozen = frozen.model_copy(update={"attempt": frozen.attempt + 1})
    return frozen, inputs


def freeze(frozen: FrozenRun, *, force: bool = False) -> None:
    """Write `config.json`, from which any process can go on. Raises UserError where the run has not begun and will not
    fit into memory by its plan, but for `force`."""
    directory = directory_of(frozen)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.json", frozen.model_dump_json(indent=2) + "\n")
    if not (force or checkpoints.any_in(directory / "checkpoints")) and device.is_known(frozen.config.infra):
        refuse(planner(frozen.config, Path(frozen.config.outputs_dir), resident_bytes()))


def finished(directory: Path) -> ModelVersion | None:
    """What the run in `directory` registered, where it is over."""
    record = directory / "version.json"
    return ModelVersion.read(record) if record.exists() else None


def train_rank(directory: Path) -> None:
    """Be the rank that the environment names, or the only one, of the frozen run in `directory`, until it has ended.
    One that has is left as it is: an engine may start it once too often.

    Rank 0 writes and says what there is to say. Raises the errors of `llmtrain.errors`, the same on all ranks where
    they come from what all compute.
    """
    frozen, outputs, stopwatch = thaw(directory / "config.json"), directory.parents[1], Stopwatch()
    infra = frozen.config.infra
    if finished(directory):
        return
    device.check(infra)
    device.apply(infra)
    if infra.ranks > 1:
        join(infra)
    ranks = strategy_of(infra, directory)
    if ranks.rank == 0:
        with only_process(directory, "lock"):
            _run(frozen, inputs_of(frozen, outputs), outputs, directory, stopwatch, ranks, print)
    else:
        _run(frozen, inputs_of(frozen, outputs), outputs, directory, stopwatch, ranks, lambda line: None)
    ranks.leave()


def _run(
    frozen: FrozenRun, inputs: Inputs, outputs: Path, directory: Path, stopwatch: Stopwatch, ranks: Alone, say: Say
) -> TrainedModel | None:
    config, journal, first = frozen.config, Journal(outputs), ranks.rank == 0
    checkpoint = ranks.same(checkpoints.newest(directory / "checkpoints") if first else None)
    say(f"run {directory}" + (f", continuing from {checkpoint.name}" if checkpoint else ""))
    if ranks.size > 1:
        say(f"{ranks.size} ranks, {config.infra.strategy}" + _about_dropout(config))
    if first:
        with stopwatch.phase("preparing"):
            for manifest in inputs.manifests:
                verify(manifest, outputs)
        kind = "run.continued" if checkpoint else "run.started"
        journal.append(kind, run_id=frozen.run_id, config_sha256=frozen.sha256)

    baseline_bytes = resident_bytes()
    lightning.seed_everything(config.trainer.seed, verbose=False)
    model = starting_network(config, inputs.parent.directory if inputs.parent else None)
    model.to(config.infra.accelerator)  # baselines and the reference are computed there too
    kernel, loss = device.attention_kernel(config.infra), device.use_loss_kernel(config.infra)
    say(f"attention by {kernel}, {loss}, {config.infra.precision}, on {config.infra.accelerator}")
    attention.use(model, kernel)
    check_log_probs(model)
    with ranks.first_alone():  # what rank 0 computes and stores, the others read
        match config.trainer:
            case PretrainTrainer() as settings:
                task = tasks.pretraining(model, settings, config, inputs, outputs)
            case SFTTrainer() as settings:
                task = tasks.supervised(model, settings, config, inputs, outputs)
            case DPOTrainer() as settings:
                with stopwatch.phase("reference"):
                    task = tasks.preference(model, settings, config, inputs, outputs, directory if first else None)
            case DistillTrainer() as settings:
                with stopwatch.phase("teacher"):
                    task = tasks.distillation(model, settings, config, inputs, outputs)
        device.prepare(model, config.infra)
        with stopwatch.phase("baselines"):
            baselines = _once(directory / "baselines.json", task.baselines)
    ranks.shard(model)
    task.module.ranks = ranks
    if ranks.rank:
        torch.manual_seed(config.trainer.seed + ranks.rank)  # dropout of its own
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    tokens = task.steps.tokens_before(step)
    if first:
        end = {"steps": len(task.steps), "tokens": task.module.total_tokens}
        write_whole(directory / "clock.json", json.dumps(end) + "\n")
    traces = Traces(frozen, task, inputs.tokenizer_directory, outputs, directory, stopwatch, tokens, ranks)

    metrics = MetricsFile(directory / "metrics.jsonl") if first else NoMetrics()
    if checkpoint is None:
        metrics.truncate(0)  # rows of a run that was killed before its first checkpoint
    tracker = open_tracker(
        config.tracking if first else NoTracking(kind="none"),
        outputs=outputs,
        experiment=config.name,
        run_id=frozen.run_id,
        run_directory=directory,
        params=config.model_dump(mode="json"),
        tags={"config_sha256": frozen.sha256, "dataset_sha256": inputs.dataset_sha256},
    )
    held = None
    if first:
        with stopwatch.phase("plan"), torch.random.fork_rng():  # a plan draws numbers, and training must not notice
            if checkpoint is None:
                actual.predict(directory, planner(config, outputs, baseline_bytes, task.steps).prediction())
            if prediction := actual.predicted(directory):
                held = HeldAgainstPlan(directory, prediction, config.infra.accelerator)
    try:
        _fit(frozen, task, directory, checkpoint, metrics, tracker, traces, ranks, held)
        if held and held.found:
            say(actual.in_words(held.found))
        say("evaluating on the test split")
        with stopwatch.phase("evaluation"):
            found = ranks.looking(lambda: task.evaluate("test"))
            figures = {f"test/{name}": value for name, value in found.items()} | baselines
        if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise NonFiniteLoss(f"{directory}: {', '.join(bad)} not finite at the end; lower trainer.lr")
        with stopwatch.phase("export"):
            whole = ranks.whole()
            if whole is None:
                return None  # rank 0 does the rest
            trained = export(frozen, whole, inputs, outputs, directory, figures, task.module.tokens)
        plot_curves(directory / "metrics.jsonl", directory / "curves.png", levels(config.trainer, baselines))
        tracker.log(task.module.step + 1, figures)
        version = Registry(outputs).register(config.name, trained, tracker_run_id=tracker.tracker_run_id)
        traces.report(version)
        for name in ("curves.png", "config.json", "metrics.jsonl", "report.html"):
            tracker.log_file(directory / name)
    except (Interrupted, TryAgain):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    finally:
        metrics.close()
    tracker.finish("FINISHED")
    journal.append("run.finished", run_id=frozen.run_id, version=version.label, weights_sha256=trained.weights_sha256)
    write_whole(directory / "version.json", version.model_dump_json(indent=2) + "\n")
    say(f"registered {version.label}: {outputs / trained.path}; report: {directory / 'report.html'}")
    _warn(config, figures, say)
    return trained


def _fit(
    frozen: FrozenRun,
    task: tasks.Task,
    directory: Path,
    checkpoint: Path | None,
    metrics: MetricsFile,
    tracker: Tracker,
    traces: Traces,
    ranks: Alone,
    held: HeldAgainstPlan | None,
) -> None:
    """Train from `checkpoint`, or from the start, to the end. Raises Interrupted or TryAgain when a signal stops it."""
    config, stopwatch = frozen.config, traces.stopwatch
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    progress = Progress(task.module.total_tokens, config.name, sys.stderr if ranks.rank == 0 else StringIO())

    def evaluate() -> dict[str, float]:
        with stopwatch.phase("evaluation"):
            figures = ranks.looking(lambda: task.evaluate("validation"))
        traces.sample()
        return figures

    between = Between(config.trainer, directory, evaluate, metrics, tracker, progress, stopwatch, traces.report, ranks)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    trainer = lightning.Trainer(
        accelerator="gpu" if config.infra.accelerator == "cuda" else "cpu",
        devices=1,
        strategy=InPlace(config.infra),
        max_epochs=1,
        logger=False,
        callbacks=[held, between] if held else [between],
        plugins=[checkpoints.AtomicCheckpoints(ranks), LightningEnvironment()],
        deterministic=config.infra.deterministic,
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    if step == len(task.steps) and checkpoint:  # killed after the last step
        state = checkpoints.AtomicCheckpoints(ranks).load_checkpoint(checkpoint)
        task.module.load_state_dict(state["state_dict"], strict=task.module.strict_loading)
        task.module.configure_optimizers()  # DeepSpeed's engine, which loads the weights itself, needs one
        ranks.restore()
        task.module.on_load_checkpoint(state)
        between.on_load_checkpoint(trainer, task.module, state)
        between.tidy()  # the kill may have come right after the last save
        return
    if checkpoint is None:
        traces.sample()
        traces.report()
    with stopwatch.phase("training"):
        trainer.fit(task.module, steps_from(task.steps, step), ckpt_path=checkpoint)
    progress.done()
    match between.agreed_to_stop():
        case None:
            return
        case signal.SIGINT:
            raise Interrupted(
                f"interrupted; {directory} is saved at step {task.module.step}: the same command continues"
            )
        case _:
            raise TryAgain(
                f"asked to stop; {directory} is saved at step {task.module.step}: the same command continues"
            )


def _about_dropout(config: TrainConfig) -> str:
    """What many ranks do to the result where tokens are dropped."""
    if getattr(config.model, "attention_dropout", 0.0) or getattr(config.adapter, "dropout", 0.0):
        return "; each draws its own dropout: another number of ranks computes another, equally likely run"
    return ""


def _warn(config: TrainConfig, figures: dict[str, float], say: Say) -> None:
    """Say what tuning cost in language, and what a margin hides."""
    trainer = config.trainer
    if not isinstance(trainer, SFTTrainer | DPOTrainer):
        return
    rise = figures["test/heldout_loss"] / figures["base/heldout_loss"] - 1
    if rise > trainer.heldout_loss_warning_share:
        advice = ", or raise trainer.beta" if isinstance(trainer, DPOTrainer) else ""
        say(
            f"warning: the held-out language loss rose by {rise:.1%}: the model does what it was shown better "
            f"and speaks worse; lower trainer.lr or trainer.epochs{advice}"
        )
    if isinstance(trainer, DPOTrainer) and trainer.loss != "kto":
        found = {name.removeprefix("test/"): value for name, value in figures.items() if name.startswith("test/")}
        for line in warnings_of(found):
            say(f"warning: {line}")


def directory_of(frozen: FrozenRun) -> Path:
    """Where the run keeps its files."""
    return Path(frozen.config.outputs_dir) / frozen.config.name / frozen.run_id


def _once(path: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `measure` returns, kept in `path`, so that a continued run is held against the same figures."""
    if not path.exists():
        write_whole(path, json.dumps(measure(), indent=2) + "\n")
    try:
        found: dict[str, float] = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged ({error}); delete it and run the same command again") from error
    return found


@contextmanager
def only_process(directory: Path, name: str) -> Iterator[None]:
    """Raises TryAgain where another process works on this run; the lock goes with the process, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TryAgain(f"{directory}: another process works on this run; wait for it, or stop it") from error
        yield
