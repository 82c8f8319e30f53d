"""A real endpoint: `python serve.py serving=litserve` on a tiny network that nobody trained."""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from llmtrain.data.tokenizer import load_tokenizer, train_bpe
from llmtrain.processes import started

CONTEXT_TOKENS = 4096
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "Größe, naïve café, 中文字符 and emoji 🎉🚀 in one line"]
LONGEST_WAIT_S = 60.0


@dataclass
class Endpoint:
    process: subprocess.Popen[str]
    url: str

    @property
    def address(self) -> tuple[str, int]:
        parts = httpx.URL(self.url)
        return parts.host, int(parts.port or 0)

    @property
    def engine_pid(self) -> int:
        """The engine's process: the child that is not multiprocessing's own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return pid

    def health(self) -> tuple[int, dict[str, Any]]:
        response = httpx.get(f"{self.url}/health")
        return response.status_code, response.json()

    def counters(self) -> dict[tuple[str, ...], float]:
        """By name and values of labels."""
        text = httpx.get(f"{self.url}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {(sample.name, *sample.labels.values()): sample.value for sample in samples}

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What `/health` says once `holds` of it."""
        stop = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < stop:
            _, said = self.health()
            if holds(said):
                return said
            time.sleep(0.02)
        raise AssertionError(f"never: {said}")

    def begin(self, path: str, body: bytes) -> http.client.HTTPConnection:
        """Send a request and do not wait for its answer; closing it is a client that goes away."""
        connection = http.client.HTTPConnection(*self.address, timeout=LONGEST_WAIT_S)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection


def make_model(directory: Path) -> Path:
    """Its weights are large enough for answers that vary."""
    train_bpe(TEXTS, 400, directory)
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT_TOKENS}
    config = Qwen3Config(
        vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.3, dtype="float32", **sizes, **heads
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(directory)
    return directory


@contextmanager
def serving(repository: Path, model: Path, outputs: Path, *overrides: str) -> Iterator[Endpoint]:
    """A ready endpoint, whose processes are gone after the block."""
    fixed = ("serving=litserve", "serving.port=0", "infra.threads=1", "tracking=none")
    process = subprocess.Popen(
        [sys.executable, str(repository / "serve.py"), f"run={model}", f"outputs_dir={outputs}", *fixed, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        said = [line := process.stdout.readline()]
        while line and " is ready: " not in line:
            said.append(line := process.stdout.readline())
        assert line, "".join(said)
        yield Endpoint(process, line.split()[-1].removesuffix("/v1"))
    finally:
        process.kill()  # the engine ends with it
        process.wait()
        process.stdout.close()


def ends(pid: int) -> None:
    """Wait until the process is gone."""
    stop = time.monotonic() + LONGEST_WAIT_S
    while started(pid) is not None:
        assert time.monotonic() < stop, f"process {pid} goes on"
        time.sleep(0.02)
