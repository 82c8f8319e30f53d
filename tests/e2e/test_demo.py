"""The README's first command, in full: it trains for some minutes on two cores."""

import re
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.artifacts import Evidence, TrainedModel, weights_sha256
from llmtrain.journal import Journal
from llmtrain.registry.registry import Registry
from llmtrain.telemetry.metrics import read
from tests.e2e.conftest import Demo, shell

pytestmark = pytest.mark.timeout(1800)


def run_directory(demo: Demo, name: str) -> Path:
    (run,) = (path for path in (demo.outputs / name).iterdir() if path.is_dir())
    return run


def test_it_shows_samples_figures_and_where_everything_is(demo: Demo):
    for part in (
        "before DPO: '",
        "after DPO: '",
        "preference accuracy",
        "bits per byte",
        "mlflow server",
        "curves.png",
    ):
        assert part in demo.output
    assert "tokens/s" in demo.output


def test_it_serves_the_tuned_model_which_passes_the_gate_and_answers(demo: Demo):
    served = demo.output.partition("$ python serve.py")[2]
    assert re.search(r"is ready: http://127\.0\.0\.1:\d+", served)
    assert re.search(r"litserve, onnx_fp32 +fp32 .* the same$", served, re.MULTILINE)
    assert re.search(r"^  'The import statement.+'$", served, re.MULTILINE)
    (evidence,) = (demo.outputs / "serving").rglob("parity-*.json")
    figures = Evidence.model_validate_json(evidence.read_bytes()).figures
    assert figures["mean_abs_dlogp_nats"] <= 1e-4
    assert figures["max_abs_dlogp_nats"] <= 1e-3


def test_the_pretrained_model_beats_a_unigram_model_by_a_nat(demo: Demo):
    metrics = TrainedModel.read(run_directory(demo, "qwen3_small-pretrain") / "trained.json").metrics
    assert metrics["test/loss"] < metrics["unigram/loss"] - 1
    assert metrics["test/bits_per_byte"] < metrics["unigram/bits_per_byte"]


def test_preference_accuracy_beats_its_baselines_by_more_than_its_standard_error(demo: Demo):
    metrics = TrainedModel.read(run_directory(demo, "qwen3_small-dpo") / "trained.json").metrics
    baseline = max(metrics["base/accuracy"], metrics["longer/accuracy"], 0.5)
    assert metrics["test/accuracy"] > baseline + metrics["test/accuracy_se"]
    assert {"test/chosen_logp_change", "test/heldout_loss", "base/heldout_loss"} <= metrics.keys()


def test_dpo_starts_at_log_two(demo: Demo):
    first = read(run_directory(demo, "qwen3_small-dpo") / "metrics.jsonl")[0]
    assert first["train/loss"] < 0.72


def test_the_model_loads_with_from_pretrained_and_is_the_last_checkpoint_tensor_for_tensor(demo: Demo):
    for name in ("qwen3_small-pretrain", "qwen3_small-dpo"):
        run = run_directory(demo, name)
        loaded = AutoModelForCausalLM.from_pretrained(run / "model")
        last = sorted((run / "checkpoints").glob("step-*"))[-1]
        state = torch.load(last / "state.pt", weights_only=True)["state_dict"]
        assert loaded.state_dict().keys() == {key.removeprefix("model.") for key in state}
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[f"model.{key}"]), key
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
        assert tokenizer.decode(tokenizer("import this").input_ids) == "import this"
        assert "## Lineage" in (run / "model" / "README.md").read_text()
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_registry_has_both_versions_and_the_lineage(demo: Demo):
    base, tuned = Registry(demo.outputs).versions()[:2]
    assert (base.label, tuned.label) == ("qwen3_small-pretrain@1.0.0", "qwen3_small-dpo@1.0.0")
    assert tuned.model.parent_version == base.label
    assert base.model.sha256 in tuned.model.parents
    assert tuned.model.weights_sha256 == weights_sha256(demo.outputs / tuned.model.path)
    listing = shell("llmtrain models", demo.directory).stdout
    assert listing.index("qwen3_small-pretrain@1.0.0") < listing.index("qwen3_small-dpo@1.0.0")
    assert Journal(demo.outputs).verify() >= 6
    events = [event["event"] for event in Journal(demo.outputs).events()]
    assert events[:3] == ["run.started", "model.registered", "run.finished"]


def test_a_second_demo_reuses_everything(demo: Demo, repository: Path):
    started = time.monotonic()
    again = shell(f"{repository}/scripts/demo --outputs outputs", demo.directory)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 2
    assert "tokens/s" not in again.stdout
    assert "is there already, made with the same settings" in again.stdout
    assert time.monotonic() - started < 180  # seconds on a quiet machine; a run would take minutes
