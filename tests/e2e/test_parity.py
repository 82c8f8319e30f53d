"""The parity gate on a real run and real engines: what was trained is served, and an older checkpoint is found out."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from llmtrain.artifacts import Evidence, TrainedModel
from llmtrain.cli.optimise import main as optimise
from llmtrain.cli.parity import main
from llmtrain.cli.train import main as train
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.models.directory import load, save
from llmtrain.training.checkpoints import AtomicCheckpoints
from tests.e2e.litserve_endpoint import Endpoint, serving

RUN = (
    "model=qwen3_tiny",
    "model.head_dim=32",  # vLLM's CPU kernels know no smaller ones
    "data=text_files",
    "data.corpus.licence=PSF-2.0",
    "infra.precision=fp32",
    "infra.threads=1",
    "trainer.budget_tokens=8_192",  # 32 steps
    "trainer.sequence_tokens=64",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=300",
    "trainer.log_every_tokens=2_048",
    "trainer.evaluate_every_tokens=4_096",
    "trainer.checkpoint_every_tokens=4_096",
    "tracking=none",
    "name=gated",
)
FEW = ["--probes", "32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, `outputs/gated/<run id>`."""
    directory = tmp_path_factory.mktemp("parity")
    text = directory / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)))
    assert train([*RUN, f"data.corpus.paths=[{text}]", f"outputs_dir={directory / 'outputs'}"]) == 0
    (found,) = (directory / "outputs" / "gated").iterdir()
    return found


def outputs_of(run: Path) -> Path:
    return run.parents[1]


def gate(run: Path, *flags: str) -> int:
    return main([f"run={run}", "--outputs", str(outputs_of(run)), *FEW, *flags])


def evidence(outputs: Path, name: str) -> Evidence:
    (path,) = outputs.glob(f"**/{name}")
    return Evidence.read(path)


def an_older_checkpoint(run: Path, directory: Path) -> Path:
    """What the run was half-way, as a model's directory."""
    oldest = min((run / "checkpoints").glob("step-*"))
    assert oldest != max((run / "checkpoints").glob("step-*"))
    model = load(run / "model")
    state = AtomicCheckpoints().load_checkpoint(oldest)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    save(model, run / "model", directory, "")
    return directory


def test_the_export_is_the_last_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(run) == 0
    said = capsys.readouterr()
    assert "the trained weights are those of its last checkpoint" in said.err
    assert "HF export" in said.out
    found = evidence(outputs_of(run), "parity-trained-transformers.json")
    assert found.parents == (TrainedModel.read(run / "trained.json").sha256,)
    assert found.figures["max_abs_dlogp_nats"] == 0, "the same numbers, read twice"
    assert evidence(outputs_of(run), "parity-trained-torch.json").figures["passed"] == 1


@pytest.fixture(scope="module")
def endpoint(repository: Path, run: Path) -> Iterator[Endpoint]:
    with serving(repository, run, outputs_of(run)) as endpoint:
        yield endpoint


def test_litserve_serves_what_was_trained(run: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(run, "--url", endpoint.url) == 0
    assert "litserve, trained  fp32" in capsys.readouterr().out
    found = evidence(outputs_of(run), "parity-trained-litserve.json")
    assert found.figures["passed"] == 1
    assert found.figures["num_probes"] == 32
    assert found.figures["max_abs_dlogp_nats"] < 1e-4


def test_an_endpoint_with_another_checkpoint_is_refused(
    run: Path, endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the run was half-way is the trained model here, and the endpoint has weights of another step."""
    stale = an_older_checkpoint(run, tmp_path / "stale")
    assert main([f"run={stale}", "--outputs", str(outputs_of(run)), *FEW, "--url", endpoint.url]) == 3
    said = capsys.readouterr()
    assert "NOT THE SAME" in said.out
    assert "litserve, trained: mean |dlogp|" in said.err
    assert "become other tokens" not in said.err


@pytest.mark.campaign
def test_an_endpoint_with_another_template_is_refused(
    repository: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, tokenizer = tmp_path / "wrong", load_tokenizer(run / "model")
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\\n'", "'<|im_end|>'")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save(load(run / "model"), tmp_path / "tokenizer", wrong, "")
    with serving(repository, wrong, outputs_of(run), "serving.name=gated-wrong") as endpoint:
        assert gate(run, "--url", endpoint.url) == 3
    said = capsys.readouterr().err
    assert "20 of 37 texts become other tokens; chat-00: first at byte" in said
    assert "mean |dlogp|" not in said


@pytest.mark.campaign
def test_each_form_passes_on_this_machine_and_behind_litserve(
    repository: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = outputs_of(run)
    kept = ["optimise.rounds=1", "optimise.documents=4", "optimise.batch_sizes=[1]", "optimise.least_agreement=0",
            "optimise.most_perplexity_increase=1", f"outputs_dir={outputs}"]  # fmt: skip
    for option in ("onnx_fp32", "onnx_int8", "onnx_int4", "int8"):
        blocks = ["optimise.block_size=32"] if "_int" in option else []  # what divides its widths
        assert optimise([f"run={run}", f"optimise={option}", *kept, *blocks]) == 0
    capsys.readouterr()
    assert gate(run) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("  ", 1)[1] for line in lines[1:]] == ["the same"] * 6
    for form in ("onnx_fp32", "onnx_int8", "onnx_int4"):
        with serving(repository, run, outputs, "serving=onnx", f"serving.form={form}") as endpoint:
            assert gate(run, "--url", endpoint.url, "--form", form) == 0
        found = evidence(outputs, f"parity-{form}-litserve.json")
        assert found.figures["passed"] == 1
        assert len(found.parents) == 3, "what was trained, the form, and what is served"
    assert evidence(outputs, "parity-onnx_int4-litserve-files.json").figures["max_abs_dlogp_nats"] < 1e-3


@pytest.mark.campaign
def test_vllm_serves_what_was_trained(repository: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (repository / ".venv-vllm/installed").exists():
        pytest.skip("needs scripts/setup-vllm")
    with vllm(repository, run, outputs_of(run)) as url:
        assert gate(run, "--url", url) == 0
    assert "vllm, trained  fp32" in capsys.readouterr().out


@contextmanager
def vllm(repository: Path, model: Path, outputs: Path) -> Iterator[str]:
    """The URL of a ready vLLM, whose processes are gone after the block."""
    line = [f"run={model}", "serving=vllm", "serving.port=0", "serving.kv_cache_gib=0.25", "serving.name=gated-vllm"]
    process = subprocess.Popen(
        [sys.executable, str(repository / "serve.py"), *line, "tracking=none", f"outputs_dir={outputs}"],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    try:
        for words in process.stdout:
            said.append(words)
            if "is ready" in words:
                yield words.split()[-1].removesuffix("/v1")
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()
