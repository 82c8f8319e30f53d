"""Starting the ranks of a frozen run on this machine, as `torchrun --standalone --max-restarts=0` does.

The ranks begin from the run's config.json; the command line that froze it is not run again. torchrun's agent is used
as a library, so that a signal reaches every rank and the rank that failed first decides the exit code.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from llmtrain.errors import Interrupted, LLMTrainError, RunFailed, TryAgain, UserError

ERRORS: dict[int, type[LLMTrainError]] = {
    error.exit_code: error for error in (UserError, RunFailed, TryAgain, Interrupted)
}
PARTING = signal.SIGTERM, signal.SIGABRT
"""What the agent ends the other ranks with once one has failed, and how gloo ends one that has lost its peers."""


def run_ranks(directory: Path, ranks: int) -> None:
    """Run the frozen run in `directory` on `ranks` processes, to its end.

    SIGINT and SIGTERM go on to every rank, which save and stop at the same step. Raises the error of the rank that
    failed first, TryAgain where it was killed; the others have been stopped by then.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the message below says it in words
    rendezvous = RendezvousParameters(
        backend="c10d", endpoint="127.0.0.1:0", run_id=uuid.uuid4().hex, min_nodes=1, max_nodes=1,
        local_addr="127.0.0.1", is_host=True,
    )  # fmt: skip
    spec = WorkerSpec(
        role="llmtrain",
        local_world_size=ranks,
        entrypoint=sys.executable,
        args=("-m", "llmtrain.cli.rank", str(directory)),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    agent = LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs())
    with _forwarding(agent), _importable():
        result = agent.run()
    spec.rdzv_handler.shutdown()
    if result.is_failed():
        raise first_error(result.failures, directory)


def first_error(failures: dict[int, ProcessFailure], directory: Path) -> LLMTrainError:
    """What to tell the user about ranks that failed, by rank: the error that the others only followed."""
    said = {rank: failure for rank, failure in failures.items() if Path(failure.error_file).is_file()}
    if said:
        first = said[min(said)]
        return ERRORS.get(first.exitcode, RunFailed)(first.message)
    killed = [rank for rank, failure in failures.items() if failure.exitcode < 0]
    if killed:
        rank = min(killed, key=lambda rank: (-failures[rank].exitcode in PARTING, failures[rank].timestamp, rank))
        number, process = signal.Signals(-failures[rank].exitcode), failures[rank].pid
        hint = " (out of memory? `dmesg` knows)" if number == signal.SIGKILL else ""
        return TryAgain(
            f"rank {rank} (process {process}) was killed by {number.name}{hint}; the other ranks were stopped. "
            f"What {directory} has saved stays: the same command continues"
        )
    rank = min(failures, key=lambda rank: (failures[rank].exitcode == TryAgain.exit_code, rank))
    return RunFailed(f"rank {rank} ended with exit code {failures[rank].exitcode}; its traceback is above")


@contextmanager
def _forwarding(agent: LocalElasticAgent) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to the ranks, while the block runs; torch's own handlers stay out."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in agent.get_worker_group().workers:
            try:
                os.kill(worker.id, number)
            except (ProcessLookupError, TypeError):  # it has ended, or has not begun
                continue

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _importable() -> Iterator[None]:
    """Let the ranks find this llmtrain where it is a checkout and not installed."""
    root, before = str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
