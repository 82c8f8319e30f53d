"""A run of each trainer that was never computed: every file that a report reads, by the real writers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from llmtrain.artifacts import DatasetManifest, ModelVersion, SplitCounts, TrainedModel
from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.report.records import Margins, Process, Processes, Sample, Samples
from llmtrain.telemetry.metrics import MetricsFile

HOSTILE = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)> & \"quoted\" '"
"""What a document may hold: it must stay text."""
BASELINES = {"unigram/loss": 6.0, "unigram/bits_per_byte": 2.5}
DPO_BASELINES = {"base/loss": math.log(2), "base/margin": 0.0, "base/accuracy": 0.4, "base/accuracy_se": 0.02,
                 "longer/accuracy": 0.55, "base/heldout_loss": 4.0, "base/heldout_bits_per_byte": 1.7}  # fmt: skip
DPO_FIGURES = {"loss": 0.5, "accuracy": 0.625, "accuracy_se": 0.03, "margin": 0.25, "chosen_logp_change": -2.0,
               "heldout_loss": 4.2, "heldout_bits_per_byte": 1.8, "chosen_logp_change_per_token": -0.05,
               "rejected_logp_change_per_token": -0.3, "margin_length_correlation": 0.125, "kl_k1": 0.01, "kl_k3": 0.02,
               "accuracy_longer_chosen": 0.75, "accuracy_shorter_chosen": 0.5}  # fmt: skip
HELDOUT = {"heldout_loss": 4.2, "heldout_bits_per_byte": 1.8}
HELDOUT_BEFORE = {"base/heldout_loss": 4.0, "base/heldout_bits_per_byte": 1.7}
SIMPO_BASELINES = DPO_BASELINES | {"base/loss": 0.9, "base/margin": 0.125}
KTO_FIGURES = {"loss": 0.45, "accuracy": 0.7, "accuracy_se": 0.02, "margin": 0.5, "chosen_logp_change": 1.0, **HELDOUT}
KTO_BASELINES = {"base/loss": 0.5, "commoner/accuracy": 0.6, **HELDOUT_BEFORE}
SFT_FIGURES = {"loss": 1.5, **HELDOUT}
SFT_BASELINES = {"base/loss": 3.0, **HELDOUT_BEFORE}
DISTILL_FIGURES = {"loss": 0.7, "divergence": 0.25, "heldout_loss": 4.5, "heldout_bits_per_byte": 1.875}
DISTILL_BASELINES = {"unigram/heldout_loss": 6.0, "unigram/heldout_bits_per_byte": 2.5, "unigram/divergence": 1.25,
                     "teacher/heldout_loss": 4.25, "teacher/heldout_bits_per_byte": 1.75}  # fmt: skip
MARGINS = Margins(split="test", beta=0.1, before=(-4.0, -2.0, 0.0, 3.0), after=(-5.0, 4.0, 2.0, 13.0))
"""Reward margins -0.1, 0.6, 0.2 and 1.0."""


@dataclass(frozen=True)
class PaperRuns:
    outputs: Path
    pretrain: Path
    sft: Path
    dpo: Path
    simpo: Path
    kto: Path
    distill: Path

    @property
    def all(self) -> tuple[Path, ...]:
        return self.pretrain, self.sft, self.dpo, self.simpo, self.kto, self.distill


def write_runs(outputs: Path) -> PaperRuns:
    """All of them, finished."""
    text, pairs = _manifest(outputs, "text", "data/t"), _manifest(outputs, "preferences", "data/p")
    chats = _manifest(outputs, "chats", "data/c")
    resolved = {
        "tokenizer_path": "tokenizers/x",
        "tokenizer_sha256": "aa" * 32,
        "text_path": text.path,
        "text_sha256": text.content_sha256,
    }
    no_parent = {"parent_version": None, "parent_path": None, "parent_weights_sha256": None}
    base = FrozenRun(
        config=load_config(["model=qwen3_tiny", "trainer.lr=1e-3", f"outputs_dir={outputs}"]),
        resolved=Resolved(**resolved, pairs_path=None, pairs_sha256=None, **no_parent),
        attempt=1,
    )
    rows = [{"train/loss": 7 - step / 10, "train/lr": 1e-3, "train/tokens_per_second": 900.0} for step in range(20)]
    rows[3]["train/loss"] = math.nan
    rows[9] |= {"validation/loss": 5.5, "validation/bits_per_byte": 2.2}
    rows[19] |= {"validation/loss": 5.25, "validation/bits_per_byte": 2.1}
    figures = {"test/loss": 5.0, "test/bits_per_byte": 2.0}
    pretrain = _run(outputs, base, rows, BASELINES, figures, (0, 10, 20))

    parent = TrainedModel.read(pretrain / "trained.json")
    from_base = {
        "parent_version": f"{base.config.name}@1.0.0",
        "parent_path": parent.path,
        "parent_weights_sha256": parent.weights_sha256,
    }
    with_pairs = {"pairs_path": pairs.path, "pairs_sha256": pairs.content_sha256, **from_base}

    def run(
        name: str, overrides: list[str], references: dict[str, str | None], before: dict[str, float],
        after: dict[str, float],
    ) -> Path:  # fmt: skip
        frozen = FrozenRun(
            config=load_config(["model=qwen3_tiny", f"name={name}", *overrides]),
            resolved=Resolved(**(no_pairs | resolved | references)),
            attempt=1,
        )
        rows = [{"train/loss": 0.7 - step / 100} for step in range(8)]
        rows[7] |= {f"validation/{metric}": value for metric, value in after.items()}
        figures = {f"test/{metric}": value for metric, value in after.items()}
        return _run(outputs, frozen, rows, before, figures, (0, 8))

    no_pairs = {"pairs_path": None, "pairs_sha256": None, **no_parent}
    with_chats = {"chats_path": chats.path, "chats_sha256": chats.content_sha256, **from_base}
    sft = run("qwen3_tiny-sft", ["trainer=sft"], with_chats, SFT_BASELINES, SFT_FIGURES)
    tracking = "tracking.uri=http://me:secret@mlflow.example:5000/"
    dpo = run("qwen3_tiny-dpo", ["trainer=dpo", tracking], with_pairs, DPO_BASELINES, DPO_FIGURES)
    MARGINS.write(dpo / "margins.json")
    losses = ["trainer=dpo", "trainer.loss=simpo"]
    simpo = run("qwen3_tiny-simpo", losses, with_pairs, SIMPO_BASELINES, DPO_FIGURES)
    MARGINS.model_copy(update={"rewards": (0.25, 0.5, 1.0, 2.0)}).write(simpo / "margins.json")
    kto = run("qwen3_tiny-kto", ["trainer=kto"], with_pairs, KTO_BASELINES, KTO_FIGURES)
    taught = {"teacher_path": parent.path, "teacher_weights_sha256": parent.weights_sha256}
    settings = ["trainer=distill", "trainer.teacher=qwen3_tiny-pretrain@1.0.0"]
    distill = run("qwen3_tiny-distill", settings, taught, DISTILL_BASELINES, DISTILL_FIGURES)
    return PaperRuns(outputs, pretrain, sft, dpo, simpo, kto, distill)


def _manifest(outputs: Path, kind: str, path: str) -> DatasetManifest:
    splits = {name: SplitCounts(num_documents=number, num_tokens=1234 * number, num_bytes=4321 * number)
              for number, name in ((18, "train"), (1, "validation"), (2, "test"))}  # fmt: skip
    content = {"text": "bb", "preferences": "cc", "chats": "ab"}[kind] * 32
    manifest = DatasetManifest(parents=(), kind=kind, path=path, content_sha256=content,
                               tokenizer_sha256="aa" * 32, splits=splits, sources={"a <b> source": "CC-BY-4.0"},
                               num_duplicates=7, num_refused=3, files={})  # fmt: skip
    (outputs / path).mkdir(parents=True)
    manifest.write(outputs / path / "manifest.json")
    return manifest


def _run(
    outputs: Path,
    frozen: FrozenRun,
    rows: list[dict[str, float]],
    baselines: dict[str, float],
    figures: dict[str, float],
    sampled: tuple[int, ...],
) -> Path:
    directory = outputs / frozen.config.name / frozen.run_id
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(frozen.model_dump_json(indent=2))
    (directory / "baselines.json").write_text(json.dumps(baselines))
    metrics = MetricsFile(directory / "metrics.jsonl")
    for step, row in enumerate(rows, start=1):
        metrics.append({"step": step, "tokens": 500 * step, **row})
    for step in sampled:
        samples = tuple(Sample(prompt=f"prompt {n} {HOSTILE}", continuation=f"step {step}\nof {n} {HOSTILE}")
                        for n in range(2))  # fmt: skip
        Samples(step=step, tokens=500 * step, samples=samples).write(directory / "samples" / f"step-{step:08d}.json")
    seconds = {"training": 8.0, "evaluation": 1.0}
    process = Process(started_at_utc="2026-01-02T03:04:05+00:00", machine={"CPU": "a <CPU>", "torch": "2.13.0"},
                      seconds=seconds, tokens=500 * len(rows) // 2)  # fmt: skip
    Processes(processes=(process, process)).write(directory / "processes.json")
    trained = TrainedModel(
        parents=("dd" * 32,), run_id=frozen.run_id, path=(directory / "model").relative_to(outputs).as_posix(),
        trainer=frozen.config.trainer.kind, shape_sha256="ee" * 32, weights_sha256=frozen.run_id * 5,
        tokenizer_sha256="aa" * 32, config_sha256=frozen.sha256, dataset_sha256="bb" * 32, recipe_sha256="ff" * 32,
        parent_version=frozen.resolved.parent_version, num_tokens_seen=500 * len(rows), metrics=figures | baselines,
    )  # fmt: skip
    trained.write(directory / "trained.json")
    version = ModelVersion(parents=(trained.sha256,), name=frozen.config.name, version="1.0.0", model=trained,
                           registered_at_utc="2026-01-02T03:05:05+00:00")  # fmt: skip
    version.write(directory / "version.json")
    return directory
