"""Everything that a report shows, read from the run's directory and from those that it points to."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.artifacts import DatasetManifest, ModelVersion, TrainedModel
from llmtrain.config.frozen import FrozenRun, thaw
from llmtrain.report.records import Margins, Process, Processes, Samples
from llmtrain.telemetry.metrics import METRICS_FILE, read


@dataclass(frozen=True)
class Ancestor:
    """A model that this one was tuned from, directly or through others."""

    label: str
    """`name@version`, or the experiment where it was never registered."""
    run_id: str
    trainer: str
    weights_sha256: str
    num_tokens_seen: int
    link: str | None
    """Its report, relative to the run's directory; None where there is none."""


@dataclass(frozen=True)
class Facts:
    """A run as it stands: `version` is there when it is finished."""

    frozen: FrozenRun
    rows: list[dict[str, Any]]
    baselines: dict[str, float]
    samples: list[Samples]
    margins: Margins | None
    processes: tuple[Process, ...]
    manifests: list[DatasetManifest]
    trained: TrainedModel | None
    version: ModelVersion | None
    ancestors: list[Ancestor]
    """The nearest first."""
    teacher: Ancestor | None
    """What it learnt from, where that was trained here."""


def gather(directory: Path, outputs: Path, version: ModelVersion | None = None) -> Facts:
    """The facts of the run in `directory`; what is not there yet is left out.

    `version` is what the run is being registered as, where `version.json` is still to be written. Raises IntegrityError
    or UserError where a file is not what its name says.
    """
    frozen = thaw(directory / "config.json")
    if version is None and (directory / "version.json").exists():
        version = ModelVersion.read(directory / "version.json")
    names = ("baselines.json", "margins.json", "processes.json", "trained.json")
    baselines, margins, processes, trained = (directory / name for name in names)
    resolved = frozen.resolved
    prepared = [resolved.text_path, resolved.pairs_path, resolved.chats_path]
    return Facts(
        frozen=frozen,
        rows=read(directory / METRICS_FILE),
        baselines=json.loads(baselines.read_text()) if baselines.exists() else {},
        samples=[Samples.read(path) for path in sorted(directory.glob("samples/step-*.json"))],
        margins=Margins.read(margins) if margins.exists() else None,
        processes=Processes.read(processes).processes if processes.exists() else (),
        manifests=[DatasetManifest.read(outputs / path / "manifest.json") for path in prepared if path],
        trained=TrainedModel.read(trained) if version and trained.exists() else None,
        version=version,
        ancestors=_ancestors(frozen, directory, outputs),
        teacher=_ancestor(resolved.teacher_path, None, directory, outputs),
    )


def _ancestors(frozen: FrozenRun, directory: Path, outputs: Path) -> list[Ancestor]:
    found: list[Ancestor] = []
    while ancestor := _ancestor(frozen.resolved.parent_path, frozen.resolved.parent_version, directory, outputs):
        assert frozen.resolved.parent_path is not None
        found.append(ancestor)
        frozen = thaw((outputs / frozen.resolved.parent_path).parent / "config.json")
    return found


def _ancestor(path: str | None, version: str | None, directory: Path, outputs: Path) -> Ancestor | None:
    """The model of `path`; None of one that was not trained here, whose hash is all that is known."""
    run = (outputs / path).parent if path else directory
    if path is None or not (run / "trained.json").exists() or not (run / "config.json").exists():
        return None
    trained, report = TrainedModel.read(run / "trained.json"), run / "report.html"
    return Ancestor(
        label=version or thaw(run / "config.json").config.name,
        run_id=trained.run_id,
        trainer=trained.trainer,
        weights_sha256=trained.weights_sha256,
        num_tokens_seen=trained.num_tokens_seen,
        link=os.path.relpath(report, directory) if report.exists() else None,
    )
