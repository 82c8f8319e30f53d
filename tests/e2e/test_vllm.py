"""The real vLLM under `python serve.py serving=vllm`: the same model as transformers', bad requests, drain, no orphans.

One start costs half a minute of a core, so most of it is left to scripts/test-full.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from llmtrain.client.client import GREEDY, Client, Sampling
from llmtrain.data.tokenizer import train_bpe
from llmtrain.errors import EngineFailed, EngineUnavailable, LLMTrainError, RequestRefused
from llmtrain.models.directory import save
from llmtrain.serving.vllm_guard import IN_FLIGHT

REPOSITORY = Path(__file__).parents[2]
CONTEXT = 1024
LONG = Sampling(max_tokens=900, temperature=0.0, ignore_eos=True)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe, 中文, 🎉?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"type": "object"}}}]
PROGRESS_S = 4

pytestmark = pytest.mark.skipif(not (REPOSITORY / ".venv-vllm/installed").exists(), reason="needs scripts/setup-vllm")
campaign = pytest.mark.campaign


class Engine:
    """`python serve.py` in a process of its own, ready."""

    def __init__(self, model: Path, place: Path, *overrides: str) -> None:
        self.place = place
        line = [f"run={model}", "serving=vllm", "serving.port=0", "serving.kv_cache_gib=0.25", "serving.name=tiny",
                "tracking=none", *overrides]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "serve.py"), *line],
            cwd=place,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        self.group = 0
        self.url = self._ready()
        self.client = Client(self.url)

    def _ready(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if "is ready" in line:
                self.group = next(iter(children(self.process.pid)))
                return line.split()[-1].removesuffix("/v1")
        raise AssertionError("\n".join(self.said))

    def ends(self) -> int:
        assert self.process.stdout is not None
        self.said += [line.rstrip() for line in self.process.stdout]
        return self.process.wait(timeout=120)

    def gauge(self, name: str) -> float:
        """The sum over the labels."""
        lines = [line for line in self.client.metrics().splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        assert lines
        return sum(float(line.split()[-1]) for line in lines)

    @property
    def log(self) -> Path:
        (path,) = self.place.glob("outputs/serving/*/vllm.log")
        return path

    def member(self, name: str) -> int:
        """The process of vLLM that calls itself so."""
        (found,) = [pid for pid in members(self.group) if Path(f"/proc/{pid}/comm").read_text().startswith(name)]
        return found

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert gone(self.group), f"left behind: {members(self.group)}"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def gone(group: int) -> bool:
    stop = time.monotonic() + 30
    while members(group) and time.monotonic() < stop:
        time.sleep(0.05)
    left = members(group)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with a tokenizer and a chat template, whose answers depend on every token."""
    place = tmp_path_factory.mktemp("tiny")
    (place / "tokenizer").mkdir()
    train_bpe([path.read_text() for path in sorted((REPOSITORY / "llmtrain").rglob("*.py"))], 512, place / "tokenizer")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, initializer_range=0.3,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    save(Qwen3ForCausalLM(config).eval(), place / "tokenizer", place / "model", "tiny")
    return place / "model"


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    place = tmp_path_factory.mktemp("adapter")
    lora.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def engine(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("engine")
    engine = Engine(model, place, f"serving.progress_seconds={PROGRESS_S}", f"serving.adapters=[lora:{adapter}]",
                    "serving.max_sequences=8", "serving.max_waiting=4")  # fmt: skip
    yield engine
    engine.stop()


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[Engine] = []

    def start(*overrides: str) -> Engine:
        started.append(Engine(model, tmp_path, *overrides))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def logprobs(network: Any, ids: list[int]) -> torch.Tensor:
    """Of each next token [tokens - 1, vocabulary]."""
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def differences(client: Client, network: Any, model: Path) -> torch.Tensor:
    """|dlogp| of every token of some texts; their likeliest tokens are equal."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = ["def f(x):", "Größe, naïve, 中文, 🎉🚀\n" * 3, (REPOSITORY / "llmtrain/errors.py").read_text()[:1200]]
    found = []
    for ids in [tokenizer(text).input_ids for text in texts]:
        wanted, scores = logprobs(network, ids), client.score(ids)
        found.append((torch.tensor(scores.logprobs) - wanted[range(len(ids) - 1), ids[1:]]).abs())
        assert list(scores.top_ids) == wanted.argmax(-1).tolist()
    assert min(map(len, found)) > 2
    return torch.cat(found)


def test_what_is_served_is_what_transformers_computes(engine, model):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = differences(engine.client, network, model)
    assert found.mean() <= 1e-4
    assert found.max() <= 1e-3
    assert engine.client.health()["status"] == "ok"
    assert engine.client.models()[0].id == "tiny"


@campaign
def test_what_is_generated_is_what_transformers_would(engine, model):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sampling = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
    (whole,) = engine.client.complete([5, 6, 7], sampling, logprobs=True, token_ids=True)
    assert whole.token_ids is not None
    assert whole.logprobs is not None
    assert (whole.prompt_token_ids, whole.finish_reason, len(whole.token_ids)) == ((5, 6, 7), "length", 20)
    wanted = logprobs(network, [5, 6, 7, *whole.token_ids])[2:]
    assert wanted.argmax(-1).tolist() == list(whole.token_ids)
    assert torch.tensor(whole.logprobs) == pytest.approx(wanted.max(-1).values, abs=1e-3)
    pieces = list(engine.client.stream_complete([5, 6, 7], sampling, logprobs=True, token_ids=True))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids or ()] == list(whole.token_ids)
    assert pieces[-1].finish_reason == "length"
    assert len(pieces) > 10


@campaign
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_chat_is_rendered_as_the_models_own_template_does(engine, model, tools):
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = tokenizer.apply_chat_template(CHAT, tools=tools, add_generation_prompt=True)["input_ids"]
    assert list(engine.client.tokenize(messages=CHAT, tools=tools).tokens) == wanted
    (answer,) = engine.client.chat(CHAT, Sampling(max_tokens=8, temperature=0.0), tools=tools, token_ids=True)
    assert list(answer.prompt_token_ids or ()) == wanted
    pieces = engine.client.stream_chat(CHAT, Sampling(max_tokens=8, temperature=0.0), tools=tools)
    assert "".join(piece.text for piece in pieces) == answer.text


@campaign
def test_equal_seeds_give_equal_texts(engine):
    def texts(seed: int) -> list[str]:
        return [
            one.text for one in engine.client.complete("def", Sampling(max_tokens=12, temperature=1, seed=seed), n=3)
        ]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)
    assert len(set(texts(3))) > 1


@campaign
def test_an_answer_ends_at_the_models_own_tokens_and_without_max_tokens_too(engine, model):
    (answer,) = engine.client.complete("def", Sampling(temperature=0.0, ignore_eos=True), token_ids=True)
    assert (len(answer.token_ids or ()), answer.finish_reason) == (512, "length")
    tokenizer = AutoTokenizer.from_pretrained(model)
    (end,) = tokenizer("<|im_end|>").input_ids
    body = {"model": "tiny", "prompt": "def", "max_tokens": 5, "logit_bias": {str(end): 100}, "return_token_ids": True}
    choice = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert (choice["finish_reason"], choice["text"], choice["token_ids"]) == ("stop", "", [end])


@campaign
def test_the_openai_client_works(engine):
    openai = OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)
    whole = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, temperature=0, logprobs=True)
    assert len(whole.choices[0].logprobs.content) == 8
    chunks = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


@campaign
def test_an_adapter_is_a_model_of_its_own(engine, model, adapter):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(network, adapter).merge_and_unload()
    assert [card.id for card in engine.client.models()] == ["tiny", "lora"]
    with Client(engine.url, "lora") as client:
        assert differences(client, merged, model).max() <= 1e-3
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert (logprobs(plain, [5, 6, 7]) - logprobs(merged, [5, 6, 7])).abs().max() > 0.1


BAD: dict[str, tuple[int, bytes | dict[str, Any]]] = {
    "malformed": (400, b'{"model": "tiny", "prompt": '),
    "no text": (400, b"\xff\xfe"),
    "deep": (400, b"[" * 100_000),
    "a list": (400, b"[1]"),
    "10 MB": (413, b'{"model": "tiny", "prompt": "' + b"a" * 10_000_000 + b'"}'),
    "negative ids": (400, {"prompt": [1, -5]}),
    "ids beyond the vocabulary": (400, {"prompt": [1, 512]}),
    "huge ids": (400, {"prompt": [2**70]}),
    "no prompt": (400, {"prompt": ""}),
    "n = 1e6": (400, {"n": 1_000_000}),
    "n = 17": (400, {"n": 17}),
    "max_tokens beyond the context": (400, {"max_tokens": CONTEXT + 1}),
    "a prompt beyond the context": (400, {"prompt": [5] * (CONTEXT + 1)}),
    "no tokens": (400, {"max_tokens": 0}),
    "unknown model": (404, {"model": "gpt-5"}),
    "hot": (400, {"temperature": 1e9}),
    "NaN": (400, b'{"model": "tiny", "prompt": "a", "temperature": NaN}'),
    "21 logprobs": (400, {"logprobs": 21}),
    "half a surrogate pair": (400, b'{"model": "tiny", "prompt": "\\ud800"}'),
    "a bad bias": (400, {"logit_bias": {"x": 1}}),
    "a bad grammar": (400, {"structured_outputs": {"regex": "(((("}}),
}


@campaign
@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_4xx_in_openais_form_and_the_others_are_served(engine, name):
    status, body = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", "prompt": "a"} | body).encode()
    response = httpx.post(
        f"{engine.url}/v1/completions", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert {"message", "type", "code"} <= set(error)
    assert error["code"] == status
    assert engine.client.complete("a", Sampling(max_tokens=1, temperature=0.0))[0].finish_reason == "length"


@campaign
def test_the_client_raises_what_the_engine_refuses(engine):
    with pytest.raises(RequestRefused) as refused:
        engine.client.complete([1, 512], GREEDY)
    assert refused.value.status == 400
    with Client(engine.url, "gpt-5") as client, pytest.raises(RequestRefused):
        client.chat(CHAT, GREEDY)


@campaign
def test_a_client_that_goes_away_costs_nothing_more(engine):
    before = engine.gauge("vllm:generation_tokens_total")
    stream = engine.client.stream_complete("def", LONG)
    next(stream)
    next(stream)
    assert engine.gauge("vllm:num_requests_running") == 1
    stream.close()  # type: ignore[attr-defined]
    freed(engine)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{engine.url}/v1/completions", json={"model": "tiny", "prompt": "a", **LONG.fields()}, timeout=0.3)
    freed(engine)
    after = engine.gauge("vllm:generation_tokens_total")
    assert 0 < after - before < 1800  # both would have been 900


def freed(engine: Engine) -> None:
    """Raises AssertionError unless nothing is computed within a second."""
    stop = time.monotonic() + 1
    while engine.gauge("vllm:num_requests_running") or engine.gauge(IN_FLIGHT):
        assert time.monotonic() < stop
        time.sleep(0.02)


def under_load(engine: Engine, number: int) -> tuple[list[threading.Thread], list[list[str] | LLMTrainError]]:
    """Streams that go on, each with a token already; what came of them, once the threads have ended."""
    came: list[list[str] | LLMTrainError] = []
    begun = threading.Semaphore(0)

    def ask() -> None:
        texts = []
        try:
            with Client(engine.url, "tiny") as client:
                for piece in client.stream_complete("def", LONG, token_ids=True):
                    if not texts:
                        begun.release()
                    texts += list(map(str, piece.token_ids or ()))  # the first piece has one at least
            came.append(texts)
        except LLMTrainError as error:
            came.append(error)

    threads = [threading.Thread(target=ask) for _ in range(number)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=60)
    return threads, came


@campaign
def test_more_than_may_wait_are_turned_away_at_once(engine):
    running, came = under_load(engine, 8)
    waiting = [threading.Thread(target=engine.client.complete, args=("a", GREEDY)) for _ in range(4)]
    for thread in waiting:
        thread.start()
    stop = time.monotonic() + 30
    while engine.gauge(IN_FLIGHT) < 12:
        assert time.monotonic() < stop
        time.sleep(0.02)
    with pytest.raises(EngineUnavailable, match="429"):
        engine.client.complete("a", GREEDY)
    for thread in running + waiting:
        thread.join()
    assert [len(tokens) if isinstance(tokens, list) else tokens for tokens in came] == [900] * 8


@campaign
def test_health_is_progress_not_a_listening_socket(engine):
    def fault() -> str:
        with suppress(EngineUnavailable):
            engine.client.health()
            return ""
        return httpx.get(f"{engine.url}/health", timeout=60).text

    def until(says: str) -> None:
        stop = time.monotonic() + 30
        while says not in (found := fault()) or bool(found) != bool(says):
            assert time.monotonic() < stop
            time.sleep(0.1)

    core = engine.member("VLLM::EngineCor")
    until("")
    os.kill(core, signal.SIGSTOP)
    try:
        until("makes no progress: no token for")
    finally:
        os.kill(core, signal.SIGCONT)
    until("")


@campaign
def test_sigterm_under_load_lets_requests_finish_and_refuses_new_ones(own):
    engine = own()
    threads, came = under_load(engine, 6)
    engine.process.send_signal(signal.SIGTERM)
    while not (engine.said and "takes no new requests" in engine.said[-1]):
        engine.said.append(engine.process.stdout.readline().rstrip())
    with pytest.raises(EngineUnavailable, match="503"):
        engine.client.complete("a", GREEDY)
    with pytest.raises(EngineUnavailable, match="503"):
        engine.client.health()
    for thread in threads:
        thread.join()
    assert [len(tokens) if isinstance(tokens, list) else tokens for tokens in came] == [900] * 6
    assert engine.ends() == 0
    assert "all requests were answered" in engine.said[-1]
    assert members(engine.group) == []


@campaign
def test_what_outlasts_the_drain_ends_with_an_error(own):
    engine = own("serving.drain_seconds=0.2")
    threads, came = under_load(engine, 3)
    core = engine.member("VLLM::EngineCor")
    os.kill(core, signal.SIGSTOP)  # so that nothing finishes before the drain is over
    engine.process.send_signal(signal.SIGTERM)
    while "[shutdown] API server: shutdown triggered" not in engine.log.read_text():
        time.sleep(0.05)
    os.kill(core, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert [type(one) for one in came] == [EngineFailed] * 3
    assert engine.ends() == 75
    assert members(engine.group) == []


@campaign
def test_an_engine_that_dies_fails_its_streams_and_ends_us(own):
    engine = own()
    threads, came = under_load(engine, 3)
    os.kill(engine.member("VLLM::EngineCor"), signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [type(one) for one in came] == [EngineFailed] * 3
    assert engine.ends() == 3
    assert any("while it served; the last lines of" in line for line in engine.said)
    assert members(engine.group) == []


@campaign
def test_a_killed_supervisor_leaves_nothing(own):
    engine = own()
    assert len(members(engine.group)) >= 3
    engine.process.kill()
    engine.process.wait()
    assert gone(engine.group)


@campaign
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs CUDA or two cores")
def test_two_ranks_compute_the_same(own, model):
    engine = own("infra.ranks=2")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert differences(engine.client, network, model).max() <= 1e-3


@campaign
def test_a_context_that_vllm_cannot_hold_is_said_with_its_own_words(model, tmp_path):
    with pytest.raises(AssertionError, match=r"first error: .*No available memory for the cache blocks"):
        Engine(model, tmp_path, "serving.kv_cache_gib=0.00001")
