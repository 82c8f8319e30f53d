"""Starting the ranks of a frozen run on this machine, as `torchrun --max-restarts=0` does.

The ranks begin from the run's config.json; the command line that froze it is not run again. torchrun's agent is used
as a library, so that a signal reaches every rank and the rank that failed first decides the exit code.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from llmtrain.errors import Interrupted, LLMTrainError, RunFailed, TryAgain, UserError
from llmtrain.processes import STOPS, importable

ERRORS: dict[int, type[LLMTrainError]] = {
    error.exit_code: error for error in (UserError, RunFailed, TryAgain, Interrupted)
}
PARTING = signal.SIGTERM, signal.SIGABRT
"""What the agent ends the other ranks with once one has failed, and how gloo ends one that has lost its peers."""
LOOPBACK = "127.0.0.1"
OTHER_NODES_S = 1800
"""How long a machine waits for the others of its run to be there."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, each with as many ranks, and which of them this is."""

    count: int
    index: int
    """From 0."""
    meeting: str
    """Host and port of machine 0, where all of them meet."""


def run_ranks(directory: Path, ranks: int, nodes: Nodes | None = None) -> None:
    """Run the frozen run in `directory` on `ranks` processes, to its end; where there are `nodes`, this one's share.

    SIGINT, SIGTERM and SIGUSR2 go on to every rank, which save and stop at the same step. Raises the error of the rank
    that failed first, TryAgain where it was killed; the others have been stopped by then. On other nodes they notice,
    and stop themselves.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the message below says it in words
    spec = WorkerSpec(
        role="llmtrain",
        local_world_size=ranks // nodes.count if nodes else ranks,
        entrypoint=sys.executable,
        args=("-m", "llmtrain.launch.rank", str(directory)),
        rdzv_handler=get_rendezvous_handler(_over(nodes, directory.name) if nodes else _here()),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=None if nodes else LOOPBACK,
    )
    agent = LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs())
    try:
        with _forwarding(agent), importable():
            result = agent.run()
    except dist.DistError as error:
        raise TryAgain(f"the machines of {directory} have not met, or lost each other: {error}") from error
    finally:
        spec.rdzv_handler.shutdown()
    if result.is_failed():
        raise first_error(result.failures, directory)


def _here() -> RendezvousParameters:
    return RendezvousParameters(
        backend="c10d", endpoint=f"{LOOPBACK}:0", run_id=uuid.uuid4().hex, min_nodes=1, max_nodes=1,
        local_addr=LOOPBACK, is_host=True,
    )  # fmt: skip


def _over(nodes: Nodes, name: str) -> RendezvousParameters:
    return RendezvousParameters(
        backend="static", endpoint=nodes.meeting, run_id=name, min_nodes=nodes.count, max_nodes=nodes.count,
        rank=nodes.index, timeout=OTHER_NODES_S,
    )  # fmt: skip


def first_error(failures: dict[int, ProcessFailure], directory: Path) -> LLMTrainError:
    """What to tell the user about ranks that failed, by rank: the error that the others only followed."""
    said = {rank: failure for rank, failure in failures.items() if Path(failure.error_file).is_file()}
    if said:
        first = said[min(said)]
        code = first.error_file_data.get("exit_code", first.exitcode)  # it may have been ended before it left
        return ERRORS.get(code, RunFailed)(first.message)
    codes = {failure.exitcode for failure in failures.values()}
    if codes & {Interrupted.exit_code, -signal.SIGINT}:
        return Interrupted(f"interrupted; what {directory} has saved stays: the same command continues")

    def followed(rank: int) -> tuple[bool, bool, int]:
        """Ordered from the rank that was first to those that its end brought down."""
        code = failures[rank].exitcode
        return -code in PARTING, code == TryAgain.exit_code, rank

    rank = min(failures, key=followed)
    code = failures[rank].exitcode
    if code == TryAgain.exit_code:
        return TryAgain(
            f"rank {rank} has lost a rank elsewhere; what {directory} has saved stays: the same command continues"
        )
    if code >= 0:
        return RunFailed(f"rank {rank} ended with exit code {code}; its traceback is above")
    number = signal.Signals(-code)
    hint = " (out of memory? `dmesg` knows)" if number == signal.SIGKILL else ""
    return TryAgain(
        f"rank {rank} (process {failures[rank].pid}) was killed by {number.name}{hint}; the other ranks were stopped. "
        f"What {directory} has saved stays: the same command continues"
    )


@contextmanager
def _forwarding(agent: LocalElasticAgent) -> Iterator[None]:
    """Hand the signals that stop a run on to the ranks, while the block runs; torch's own handlers stay out."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"

    def forward(number: int, frame: FrameType | None) -> None:
        processes = [worker.id for worker in agent.get_worker_group().workers if isinstance(worker.id, int)]
        if not processes:  # none has begun: it is for this process
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        for process in processes:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)

    before = {number: signal.signal(number, forward) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
