"""What a run writes to be looked at, and never reads back: samples/, processes.json and report.html."""

import sys
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path

from llmtrain.artifacts import ModelVersion
from llmtrain.config.frozen import FrozenRun
from llmtrain.data.tokenizer import decode_text, load_tokenizer
from llmtrain.errors import LLMTrainError
from llmtrain.files import write_whole
from llmtrain.report.page import page
from llmtrain.report.records import Process, Processes, Sample, Samples
from llmtrain.telemetry.stopwatch import Stopwatch
from llmtrain.training.machine import machine
from llmtrain.training.ranks.alone import Alone
from llmtrain.training.samples import continuations
from llmtrain.training.tasks import Task


class ReportFailed(UserWarning):
    """The page could not be made for a reason of its own. Training goes on; the tests take it for an error."""


class Traces:
    """The traces of one process that works on a run; it has `tokens_before` behind it when the process begins."""

    def __init__(
        self,
        frozen: FrozenRun,
        task: Task,
        tokenizer_directory: Path,
        outputs: Path,
        directory: Path,
        stopwatch: Stopwatch,
        tokens_before: int,
        ranks: Alone,
    ) -> None:
        self.frozen, self.task, self.outputs, self.directory = frozen, task, outputs, directory
        self.tokenizer, self.stopwatch = load_tokenizer(tokenizer_directory), stopwatch
        self.started_at_utc = datetime.now(UTC).isoformat(timespec="seconds")
        self.machine = machine()
        self.tokens_before, self.ranks = tokens_before, ranks
        self._earlier: tuple[Process, ...] | None = None

    def sample(self) -> None:
        """Let the model, as it is, continue the task's prompts by `trainer.sample_tokens`."""
        num_tokens, prompts = self.frozen.config.trainer.sample_tokens, self.task.prompts
        if not (num_tokens and prompts):
            return
        with self.stopwatch.phase("samples"):
            module, trainer = self.task.module, self.frozen.config.trainer
            infra = self.frozen.config.infra
            written = self.ranks.looking(
                lambda: continuations(module.model, prompts, num_tokens, seed=trainer.seed, infra=infra)
            )
            if self.ranks.rank:
                return
            samples = tuple(
                Sample(prompt=decode_text(self.tokenizer, prompt.tolist()), continuation=self._until_the_end(ids))
                for prompt, ids in zip(prompts, written, strict=True)
            )
            samples_of_step = Samples(step=module.step, tokens=module.tokens, samples=samples)
            samples_of_step.write(self.directory / "samples" / f"step-{module.step:08d}.json")

    def _until_the_end(self, ids: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        return decode_text(self.tokenizer, ids[: ids.index(end)] if end in ids else ids)

    def report(self, version: ModelVersion | None = None) -> None:
        """Write report.html as things stand; `version` is what a finished run was registered as."""
        if self.ranks.rank:
            return
        with self.stopwatch.phase("report"):
            path = self.directory / "report.html"
            try:
                self._write_processes()
                write_whole(path, page(self.directory, self.outputs, version))
            except (OSError, LLMTrainError) as error:  # no room, or a damaged file
                print(f"no new {path}: {error}", file=sys.stderr)
            except Exception:  # a mistake of ours: hours of training must not end for it
                why = traceback.format_exc()
                warnings.warn(f"training goes on without a new {path}: {why}", ReportFailed, stacklevel=2)

    def _write_processes(self) -> None:
        path = self.directory / "processes.json"
        if self._earlier is None:
            self._earlier = Processes.read(path).processes if path.exists() else ()
        process = Process(
            started_at_utc=self.started_at_utc,
            machine=self.machine,
            seconds=self.stopwatch.seconds,
            tokens=self.task.module.tokens - self.tokens_before,
        )
        Processes(processes=(*self._earlier, process)).write(path)
