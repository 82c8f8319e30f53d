"""vLLM's own OpenAI server, started with what the model's record and the config say, and supervised."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from llmtrain.artifacts import ServedModel
from llmtrain.client.protocol import MOST_CHOICES, MOST_LOGPROBS
from llmtrain.config.infra import Infra
from llmtrain.config.serving import VLLMServing
from llmtrain.errors import IntegrityError, UserError
from llmtrain.serving import vllm_guard
from llmtrain.serving.served import serving_directory
from llmtrain.serving.supervise import Child, supervise

MODULE = "vllm.entrypoints.openai.api_server"  # the command `vllm` does not start in the CPU package
GUARD = "llmtrain_vllm_guard"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM has kernels for: the next larger one is taken."""
TEMPLATE = "chat_template.jinja"
GIB = 2**30
TRACKED = ("prompt_tokens", "generation_tokens", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
           "num_preemptions", "request_queue_time_seconds", "time_to_first_token_seconds",
           "inter_token_latency_seconds", "e2e_request_latency_seconds")  # fmt: skip
"""Those of vLLM's metrics that reach the tracker; LitServe's have the same names where the same is meant."""


def serve_vllm(
    served: ServedModel,
    directory: Path,
    serving: VLLMServing,
    infra: Infra,
    outputs: Path,
    say: Callable[[str], None],
    track: Callable[[dict[str, float]], None],
) -> int:
    """Serve the model in `directory` until SIGTERM or Ctrl-C; `say` has the address when it is ready.

    Returns 0 where all requests were answered, 75 where some were still under way after `serving.drain_seconds` or a
    second signal came. `track` is told the counters once a minute and at the end. vLLM's own output goes to `vllm.log`
    in the endpoint's directory. For the main thread, which signals go to. Raises UserError where vLLM is not installed,
    does not fit the config, or its port is taken, IntegrityError where the chat template is not the recorded one, and
    EngineFailed where vLLM ends by itself or is not ready in time.
    """
    python = interpreter(serving)
    port = port_on(serving.host, serving.port)
    with tempfile.TemporaryDirectory(prefix="llmtrain-vllm-") as name:
        private = Path(name)
        (private / f"{GUARD}.py").symlink_to(Path(vllm_guard.__file__).resolve())
        child = Child(
            name=f"vLLM with {served.label}",
            command=(str(python), "-m", MODULE, *arguments(served, directory, serving, infra, port)),
            environment=environment(served, serving, infra, private),
            log=serving_directory(served, outputs) / "vllm.log",
            url=f"http://{_reached(serving.host)}:{port}",
            draining=_draining(private),
            in_flight=vllm_guard.IN_FLIGHT,
            start_seconds=serving.start_seconds,
            drain_seconds=serving.drain_seconds,
        )
        return supervise(child, say, lambda text: track(figures(text)) if text else None)


def arguments(served: ServedModel, directory: Path, serving: VLLMServing, infra: Infra, port: int) -> list[str]:
    """vLLM's command line, without the interpreter.

    Raises UserError for an adapter that is none, IntegrityError where the chat template is not the recorded one.
    """
    on_gpu = infra.accelerator == "cuda"
    compiles = on_gpu if serving.compile is None else serving.compile
    template = _template(served, directory)
    return [
        *("--model", str(directory), "--tokenizer", str(directory), "--served-model-name", served.name),
        *("--host", serving.host, "--port", str(port)),
        *(
            "--dtype",
            DTYPES[served.precision] if served.form == "trained" else "auto",
            "--max-model-len",
            str(served.context_tokens),
        ),
        *(("--chat-template", str(template)) if template else ()),
        # Nothing of the directory's generation_config.json but its end tokens: sampling is what the request says.
        *("--generation-config", "vllm", "--seed", str(serving.seed)),
        *("--max-num-seqs", str(serving.max_sequences), "--max-logprobs", str(MOST_LOGPROBS)),
        *("--tensor-parallel-size", str(infra.ranks)),
        *(("--gpu-memory-utilization", str(serving.gpu_memory_fraction)) if on_gpu else ()),
        *(() if on_gpu else ("--kv-cache-memory-bytes", str(int(serving.kv_cache_gib * GIB)))),
        *(() if compiles else ("--enforce-eager",)),
        *_adapters(serving.adapters),
        *("--middleware", f"{GUARD}.Guard", "--disable-uvicorn-access-log", "--disable-fastapi-docs"),
    ]


def environment(served: ServedModel, serving: VLLMServing, infra: Infra, private: Path) -> dict[str, str]:
    """The child's whole environment: ours without what steers our own Python, and what vLLM has no options for.

    `private` is a directory of the child's own, which has the guard's module. Raises UserError where the threads that
    `infra` wants have not each a core.
    """
    guard = {
        "model": served.name,
        "draining": str(_draining(private)),
        "max_body_bytes": serving.max_body_bytes,
        "max_in_flight": serving.max_sequences + serving.max_waiting,
        "default_max_tokens": min(serving.default_max_tokens, served.context_tokens),
        "progress_seconds": serving.progress_seconds,
    }
    ours = {
        "PYTHONPATH": str(private),
        vllm_guard.SETTINGS: json.dumps(guard),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_MAX_N_SEQUENCES": str(MOST_CHOICES),
    }
    if infra.accelerator == "cpu":
        ours["VLLM_CPU_OMP_THREADS_BIND"] = _cores(infra)
    dropped = ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in dropped} | ours


def interpreter(serving: VLLMServing) -> Path:
    """The Python that has vLLM. Raises UserError where none has."""
    if serving.python is not None:
        python = Path(serving.python)
        if not _has_vllm(python):
            raise UserError(
                f"serving.python={python} has no vLLM; run scripts/setup-vllm and leave serving.python=null, or "
                f"install it there: {python} -m pip install vllm"
            )
        return python
    for root in (Path.cwd(), Path(__file__).parents[2]):
        python = root / ".venv-vllm" / "bin" / "python"
        if (root / ".venv-vllm" / "installed").exists():
            return python
    if find_spec("vllm") is not None:
        return Path(sys.executable)
    raise UserError(
        "serving=vllm needs vLLM in an environment of its own, .venv-vllm: run scripts/setup-vllm (two minutes), or "
        "name an interpreter that has it: serving.python=/path/to/python; serving=litserve needs nothing"
    )


def figures(text: str) -> dict[str, float]:
    """What a tracker is told of vLLM's `/metrics`: totals since the start, and means of times; empty for no text."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("vllm:")
        if name not in TRACKED:
            continue
        totals = dict.fromkeys(("", "_total", "_sum", "_count"), 0.0)
        for sample in family.samples:
            kind = sample.name.removeprefix(family.name)
            if kind in totals:
                totals[kind] += sample.value
        if family.type != "histogram":
            found[f"serving/{name}"] = totals["_total"] + totals[""]
        elif totals["_count"]:
            found[f"serving/{name}_mean"] = totals["_sum"] / totals["_count"]
    return found


def port_on(host: str, wanted: int) -> int:
    """`wanted`, or a free one for 0; another process may still be quicker to take it.

    Raises UserError where the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, wanted), family=family) as listener:
            port: int = listener.getsockname()[1]
            return port
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{wanted} ({error.strerror or error}); set serving.port=0 for a free port, or "
            f"stop what listens there"
        ) from error


def _draining(private: Path) -> Path:
    return private / "draining"


def _reached(host: str) -> str:
    """Where a server that listens on `host` is reached from here, as URLs write it."""
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{own}]" if ":" in own else own


def _has_vllm(python: Path) -> bool:
    looks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", looks], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


def _template(served: ServedModel, directory: Path) -> Path | None:
    """The model's own template, named so that vLLM takes no other; None where it has none, or has it in
    `tokenizer_config.json`, where vLLM finds it. Raises IntegrityError where it is not the recorded one."""
    path = directory / TEMPLATE
    if not path.exists():
        return None
    found = hashlib.sha256(path.read_text().encode()).hexdigest()
    if served.template_sha256 not in (None, found):
        raise IntegrityError(
            f"{path} is not the chat template that {served.label} was trained with (its hash is {found[:12]}, "
            f"{served.template_sha256[:12]} is recorded); restore the file from a copy"
        )
    return path


def _adapters(adapters: tuple[str, ...]) -> list[str]:
    if not adapters:
        return []
    ranks, modules = [], []
    for adapter in adapters:
        name, _, place = adapter.partition(":")
        path = Path(place) / "adapter_config.json"
        if not name or not path.exists():
            raise UserError(
                f"serving.adapters: {adapter!r} should be name:directory, of a LoRA adapter in PEFT's form: {path} is "
                f"not there"
            )
        ranks.append(int(json.loads(path.read_text())["r"]))
        modules.append(f"{name}={Path(place).resolve()}")
    fitting = [rank for rank in LORA_RANKS if rank >= max(ranks)]
    if not fitting:
        raise UserError(f"serving.adapters: rank {max(ranks)} is more than vLLM has kernels for ({LORA_RANKS[-1]})")
    return ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(fitting[0]),
            "--lora-modules", *modules]  # fmt: skip


def _cores(infra: Infra) -> str:
    """The cores of each rank, as `0,1|2,3`; `auto`, one thread a physical core, where vLLM may choose."""
    if infra.threads is None and infra.ranks == 1:
        return "auto"
    cores = sorted(os.sched_getaffinity(0))
    threads = infra.threads or max(len(cores) // infra.ranks, 1)
    if threads * infra.ranks > len(cores):
        raise UserError(
            f"infra.ranks={infra.ranks} with {threads} threads each need {threads * infra.ranks} cores, this process "
            f"may use {len(cores)}; set infra.ranks=1, or infra.threads to less"
        )
    shares = [cores[rank * threads : (rank + 1) * threads] for rank in range(infra.ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)
