"""An endpoint's counters, to the tracker: each start of an endpoint is a run there, and has a `metrics.jsonl`."""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from llmtrain.artifacts import ServedModel
from llmtrain.config.tracking import Tracking
from llmtrain.errors import LLMTrainError
from llmtrain.telemetry.metrics import METRICS_FILE, MetricsFile
from llmtrain.telemetry.tracking import Tracker, Trackers, open_tracker

EXPERIMENT = "serving"
Row = tuple[int, dict[str, str | float], dict[str, float]]
"""Seconds since the start, its times, and the counters."""
logger = logging.getLogger(__name__)


class Tracked:
    """Call it with counters and it returns at once: a thread of its own writes and sends them, in order."""

    def __init__(self, served: ServedModel, place: Path, tracking: Tracking, outputs: Path, engine: str) -> None:
        self._served, self._tracking, self._outputs, self._engine = served, tracking, outputs, engine
        self.directory = place / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self.directory.mkdir(parents=True)
        self._began = time.monotonic()
        self._waiting: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="tracker", daemon=True)
        self._thread.start()

    def __call__(self, metrics: dict[str, float]) -> None:
        seconds = time.monotonic() - self._began
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._waiting.put((round(seconds), {"time_utc": now, "seconds": round(seconds, 3)}, metrics))

    def finish(self) -> None:
        """Wait until all is written and sent, a minute at most."""
        self._waiting.put(None)
        self._thread.join(timeout=60)

    def _send_all(self) -> None:
        file = MetricsFile(self.directory / METRICS_FILE)
        tracker: Tracker | None = None
        try:
            while (row := self._waiting.get()) is not None:
                step, times, metrics = row
                file.append({"step": step, **times, **metrics})
                if tracker is None:  # with the first row, which it reads there: an endpoint that nobody uses is no run
                    tracker = self._open()
                else:
                    tracker.log(step, metrics)
            if tracker is not None:
                tracker.finish("FINISHED")
        finally:
            file.close()

    def _open(self) -> Tracker:
        try:
            return self._reached()
        except LLMTrainError as error:
            logger.warning("serving metrics are in %s only: %s", self.directory / METRICS_FILE, error)
            return Trackers()

    def _reached(self) -> Tracker:
        return open_tracker(
            self._tracking,
            outputs=self._outputs,
            experiment=EXPERIMENT,
            run_id=f"{self._served.name}-{self.directory.name}",
            run_directory=self.directory,
            params={"engine": self._engine, **self._served.model_dump(mode="json", exclude={"parents"})},
            tags={"llmtrain.served": self._served.label},
        )


@contextmanager
def tracked(served: ServedModel, place: Path, tracking: Tracking, outputs: Path, engine: str) -> Iterator[Tracked]:
    """A `Tracked` for the block; what it was told is sent at the end, whatever ends it."""
    sink = Tracked(served, place, tracking, outputs, engine)
    try:
        yield sink
    finally:
        sink.finish()
