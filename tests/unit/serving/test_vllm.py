"""What vLLM is started with follows from the model's record and the config; what is wrong is said before it starts."""

import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.artifacts import ServedModel
from llmtrain.config.compose import Composer
from llmtrain.config.serve import ServeConfig
from llmtrain.config.serving import VLLMServing
from llmtrain.errors import IntegrityError, UserError
from llmtrain.serving import vllm
from llmtrain.serving.vllm import arguments, environment, figures, interpreter, port_on
from llmtrain.serving.vllm_guard import SETTINGS

TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def config(*overrides: str) -> tuple[VLLMServing, Any]:
    whole = Composer((), "serve", root=ServeConfig).check(["run=model", "serving=vllm", *overrides]).good()
    assert isinstance(whole.serving, VLLMServing)
    return whole.serving, whole.infra


def served(directory: Path, **changes: Any) -> ServedModel:
    facts = {
        "parents": (), "label": "chat@1.2.0", "name": "chat", "form": "trained", "path": str(directory),
        "weights_sha256": "0" * 64, "precision": "fp32", "context_tokens": 2048, "stop_ids": (2,),
        "template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
    }  # fmt: skip
    return ServedModel.model_validate(facts | changes)


def options(found: list[str]) -> dict[str, list[str]]:
    """The values of each option."""
    values: dict[str, list[str]] = {}
    for word in found:
        if word.startswith("--"):
            values[word] = []
        else:
            values[next(reversed(values))].append(word)
    return values


def test_everything_follows_from_the_record_and_the_config(directory):
    assert options(arguments(served(directory), directory, *config(), port=4711)) == {
        "--model": [str(directory)],
        "--tokenizer": [str(directory)],
        "--served-model-name": ["chat"],
        "--host": ["127.0.0.1"],
        "--port": ["4711"],
        "--dtype": ["float32"],
        "--max-model-len": ["2048"],
        "--chat-template": [str(directory / "chat_template.jinja")],
        "--generation-config": ["vllm"],
        "--seed": ["0"],
        "--max-num-seqs": ["16"],
        "--max-logprobs": ["20"],
        "--tensor-parallel-size": ["1"],
        "--kv-cache-memory-bytes": ["4294967296"],
        "--enforce-eager": [],
        "--middleware": ["llmtrain_vllm_guard.Guard"],
        "--disable-uvicorn-access-log": [],
        "--disable-fastapi-docs": [],
    }


@pytest.mark.parametrize(
    ("record", "overrides", "changed"),
    [
        ({"precision": "bf16"}, (), {"--dtype": ["bfloat16"]}),
        ({"form": "safetensors_int8"}, ("serving.form=safetensors_int8",), {"--dtype": ["auto"]}),
        ({}, ("infra.ranks=2",), {"--tensor-parallel-size": ["2"]}),
        ({}, ("infra=local_gpu",),
         {"--kv-cache-memory-bytes": None, "--gpu-memory-utilization": ["0.9"], "--enforce-eager": None}),
        ({}, ("infra=local_gpu", "serving.compile=false", "serving.gpu_memory_fraction=0.5"),
         {"--kv-cache-memory-bytes": None, "--gpu-memory-utilization": ["0.5"]}),
        ({}, ("serving.compile=true", "serving.seed=7", "serving.max_sequences=3", "serving.kv_cache_gib=0.5"),
         {"--enforce-eager": None, "--seed": ["7"], "--max-num-seqs": ["3"], "--kv-cache-memory-bytes": ["536870912"]}),
        ({}, ("serving.host=0.0.0.0",), {"--host": ["0.0.0.0"]}),
    ],
    ids=["bf16", "int8", "two ranks", "gpu", "gpu, eager", "others", "host"],
)  # fmt: skip
def test_what_a_change_changes(directory, record, overrides, changed):
    plain = options(arguments(served(directory), directory, *config(), port=4711))
    found = options(arguments(served(directory, **record), directory, *config(*overrides), port=4711))
    names = plain.keys() | found.keys()
    assert {name: found.get(name) for name in names if found.get(name) != plain.get(name)} == changed


@pytest.mark.parametrize(("ranks", "kernels"), [((4, 16), "16"), ((24,), "32"), ((1, 2), "8")])
def test_adapters_are_loaded_with_the_next_rank_that_there_are_kernels_for(directory, tmp_path, ranks, kernels):
    names = []
    for number, rank in enumerate(ranks):
        adapter = tmp_path / f"adapter{number}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"r": rank}))
        names.append(f"a{number}:{adapter}")
    found = options(arguments(served(directory), directory, *config(f"serving.adapters=[{','.join(names)}]"), port=1))
    assert found["--enable-lora"] == []
    assert found["--max-lora-rank"] == [kernels]
    assert found["--max-loras"] == [str(len(ranks))]
    assert found["--lora-modules"] == [name.replace(":", "=") for name in names]


def test_an_adapter_that_is_none_is_refused(directory, tmp_path):
    with pytest.raises(UserError, match=r"serving\.adapters: 'sql:.*should be name:directory"):
        arguments(served(directory), directory, *config(f"serving.adapters=[sql:{tmp_path}]"), port=1)


def test_another_template_than_the_recorded_one_is_refused(directory):
    (directory / "chat_template.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(IntegrityError, match=r"is not the chat template that chat@1\.2\.0 was trained with"):
        arguments(served(directory), directory, *config(), port=1)


def test_a_template_in_the_tokenizers_config_is_left_to_vllm(directory):
    (directory / "chat_template.jinja").unlink()
    assert "--chat-template" not in arguments(served(directory), directory, *config(), port=1)


def test_the_environment_is_ours_without_our_python(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("A_SETTING", "kept")
    found = environment(served(directory), *config("serving.max_waiting=4"), tmp_path)
    assert found["A_SETTING"] == "kept"
    assert "VIRTUAL_ENV" not in found
    assert {name: found[name] for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS",
            "VLLM_MAX_N_SEQUENCES", "VLLM_CPU_OMP_THREADS_BIND")} == {
        "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_N_SEQUENCES": "16", "VLLM_CPU_OMP_THREADS_BIND": "auto",
    }  # fmt: skip
    assert json.loads(found[SETTINGS]) == {
        "model": "chat", "draining": str(tmp_path / "draining"), "max_body_bytes": 1048576, "max_in_flight": 20,
        "default_max_tokens": 512, "progress_seconds": 30.0,
    }  # fmt: skip


def test_a_default_answer_is_no_longer_than_the_context(directory, tmp_path):
    found = environment(served(directory, context_tokens=100), *config(), tmp_path)
    assert json.loads(found[SETTINGS])["default_max_tokens"] == 100


@pytest.mark.parametrize(
    ("cores", "overrides", "binding"),
    [
        ({0, 1, 2, 3}, ("infra.threads=2",), "0,1"),
        ({0, 1, 2, 3}, ("infra.ranks=2",), "0,1|2,3"),
        ({2, 5, 7}, ("infra.ranks=2", "infra.threads=1"), "2|5"),
    ],
)
def test_ranks_share_out_the_cores_of_this_process(directory, tmp_path, monkeypatch, cores, overrides, binding):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    found = environment(served(directory), *config(*overrides), tmp_path)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == binding


def test_more_threads_than_cores_are_refused(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    with pytest.raises(UserError, match=r"infra\.ranks=2 with 2 threads each need 4 cores, this process may use 3"):
        environment(served(directory), *config("infra.ranks=2", "infra.threads=2"), tmp_path)


def test_an_environment_beside_the_working_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(UserError, match="run scripts/setup-vllm"):
        interpreter(config()[0])
    (tmp_path / ".venv-vllm").mkdir()
    with pytest.raises(UserError, match="run scripts/setup-vllm"):  # begun, not finished
        interpreter(config()[0])
    (tmp_path / ".venv-vllm" / "installed").touch()
    assert interpreter(config()[0]) == tmp_path / ".venv-vllm/bin/python"


@pytest.mark.parametrize("python", [sys.executable, "/absent/python"])
def test_a_named_interpreter_without_vllm_is_refused(python):
    with pytest.raises(UserError, match=r"serving\.python=.* has no vLLM; run scripts/setup-vllm"):
        interpreter(config(f"serving.python={python}")[0])


def test_a_port_is_free_or_refused():
    port = port_on("127.0.0.1", 0)
    refused = pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*set serving\.port=0")
    with socket.create_server(("127.0.0.1", port)), refused:
        port_on("127.0.0.1", port)
    assert port_on("127.0.0.1", port) == port


def test_the_tracker_is_told_totals_and_means():
    text = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 30.0
vllm:generation_tokens_total{engine="1"} 12.0
vllm:generation_tokens_created{engine="0"} 1.7e9
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 4.0
vllm:time_to_first_token_seconds_count 4.0
vllm:time_to_first_token_seconds_sum 1.0
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_count 0.0
vllm:e2e_request_latency_seconds_sum 0.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info 1.0
"""
    assert figures(text) == {
        "serving/generation_tokens": 42.0,
        "serving/num_requests_running": 3.0,
        "serving/time_to_first_token_seconds_mean": 0.25,
    }
    assert figures("") == {}
