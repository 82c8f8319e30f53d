"""LitServe as its users see it: real processes, our client and OpenAI's, bad input, clients that leave, signals."""

import json
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from llmtrain.client.client import Client, Sampling
from llmtrain.client.protocol import ChatRequest, CompletionRequest, DetokenizeRequest
from llmtrain.config.compose import Composer
from llmtrain.config.serve import ServeConfig
from llmtrain.errors import EngineFailed, EngineUnavailable, RequestRefused
from llmtrain.serving.run import serve
from tests.e2e.conftest import shell
from tests.e2e.litserve_endpoint import CONTEXT_TOKENS, Endpoint, ends, make_model, serving

MAX_SEQUENCES, MAX_WAITING = 4, 40
CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "The quick brown"}]}
MESSAGES = [{"role": "system", "content": "fox"}, {"role": "user", "content": "Größe 🎉"}]
LONG = json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("litserve") / "tiny")


@pytest.fixture(scope="module")
def endpoint(repository: Path, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Prompts are fed 16 tokens at a time, so that long ones take many steps."""
    settings = {
        "max_sequences": MAX_SEQUENCES, "max_waiting": MAX_WAITING, "prefill_tokens": 16, "progress_seconds": 1.5,
        "max_body_bytes": 50_000, "default_max_tokens": 16,
    }  # fmt: skip
    overrides = [f"serving.{name}={value}" for name, value in settings.items()]
    with serving(repository, model_directory, tmp_path_factory.mktemp("outputs"), *overrides) as endpoint:
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Client]:
    with Client(endpoint.url) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_directory)


@pytest.fixture(scope="module")
def network(model_directory: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(model_directory).eval()


@torch.inference_mode()
def greedy(network: Qwen3ForCausalLM, ids: list[int], num_tokens: int) -> list[int]:
    """transformers' own answer."""
    out = network.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
        max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@torch.inference_mode()
def logprobs(network: Qwen3ForCausalLM, ids: list[int]) -> torch.Tensor:
    return network(torch.tensor([ids])).logits[0].log_softmax(-1)


def post(endpoint: Endpoint, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{endpoint.url}{path}", json={"model": "tiny", **body}, timeout=60)


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_chats_are_the_templates_text_and_transformers_tokens(
    client: Client, tokenizer: Any, network: Qwen3ForCausalLM
) -> None:
    (answer,) = client.chat(MESSAGES, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True), token_ids=True)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert list(answer.prompt_token_ids) == prompt
    assert list(answer.token_ids) == greedy(network, prompt, 12)
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.finish_reason == "length"
    assert list(client.tokenize(messages=MESSAGES).tokens) == prompt


def test_scores_are_transformers_log_probabilities(client: Client, network: Qwen3ForCausalLM) -> None:
    ids = list(range(5, 45))
    expected = logprobs(network, ids)
    scores = client.score(ids)
    own = [expected[place, token].item() for place, token in enumerate(ids[1:])]
    assert scores.logprobs == pytest.approx(own, abs=1e-4)
    assert list(scores.top_ids) == expected[:-1].argmax(-1).tolist()


@pytest.mark.parametrize("field", ["completion", "chat"])
def test_streams_say_what_whole_answers_say(endpoint: Endpoint, field: str) -> None:
    body = {
        "max_tokens": 40, "temperature": 1.0, "seed": 3, "n": 2, "ignore_eos": True, "return_token_ids": True,
        **({"prompt": "lazy dog", "logprobs": 2} if field == "completion" else {**HELLO, "logprobs": True}),
    }  # fmt: skip
    path = COMPLETE if field == "completion" else CHAT
    whole = post(endpoint, path, **body).json()
    with httpx.stream("POST", f"{endpoint.url}{path}", timeout=60, json={
        "model": "tiny", **body, "stream": True, "stream_options": {"include_usage": True}
    }) as response:  # fmt: skip
        *found, last, done = events(response)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert done == "[DONE]"
    assert json.loads(last) | {"usage": whole["usage"], "choices": []} == json.loads(last)
    assert whole["usage"]["completion_tokens"] == 80
    chunks = [json.loads(event) for event in found]
    for expected in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        assert [token for choice in mine for token in choice["token_ids"]] == expected["token_ids"]
        assert [choice["finish_reason"] for choice in mine][-1] == "length"
        assert all(choice["finish_reason"] is None for choice in mine[:-1])
        if field == "completion":
            assert "".join(choice["text"] for choice in mine) == expected["text"]
            for name, values in expected["logprobs"].items():
                told = [one for choice in mine for one in choice["logprobs"][name]]
                assert told == [pytest.approx(value, abs=1e-5) for value in values]
        else:
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(choice["delta"]["content"] for choice in mine) == expected["message"]["content"]
            told = [one["token"] for choice in mine for one in choice["logprobs"]["content"]]
            assert told == [one["token"] for one in expected["logprobs"]["content"]]


def test_choices_of_several_prompts_come_in_order(endpoint: Endpoint, client: Client, tokenizer: Any) -> None:
    prompts = ["quick brown fox", "lazy dog"]
    body = post(endpoint, COMPLETE, prompt=prompts, n=2, max_tokens=6, temperature=0, return_token_ids=True).json()
    found = [(choice["index"], choice["prompt_token_ids"], choice["text"]) for choice in body["choices"]]
    alone = {prompt: client.complete(prompt, Sampling(max_tokens=6, temperature=0.0))[0].text for prompt in prompts}
    ids = {prompt: tokenizer(prompt)["input_ids"] for prompt in prompts}
    assert found == [(place, ids[prompts[place // 2]], alone[prompts[place // 2]]) for place in range(4)]
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids.values()))


def test_log_probabilities_in_both_forms_and_echo(
    endpoint: Endpoint, tokenizer: Any, network: Qwen3ForCausalLM
) -> None:
    ids = tokenizer("lazy dog")["input_ids"]
    answer = post(
        endpoint, COMPLETE, prompt="lazy dog", max_tokens=5, temperature=0, logprobs=3, echo=True, ignore_eos=True,
        return_token_ids=True,
    ).json()  # fmt: skip
    (choice,) = answer["choices"]
    told, all_ids = choice["logprobs"], ids + choice["token_ids"]
    expected = logprobs(network, all_ids)
    assert choice["text"] == "lazy dog" + tokenizer.decode(choice["token_ids"])
    assert told["tokens"] == [tokenizer.decode([token]) for token in all_ids]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    own = [expected[place, token].item() for place, token in enumerate(all_ids[1:])]
    assert told["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
    best = expected[:-1].topk(3)
    for place, top in enumerate(told["top_logprobs"][1:]):
        alternatives: dict[str, float] = {}  # several bytes have the text U+FFFD: the likeliest comes first
        for token, value in zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True):
            alternatives.setdefault(tokenizer.decode([token]), value)
        alternatives.setdefault(told["tokens"][place + 1], own[place])
        assert top == pytest.approx(alternatives, abs=1e-4)
    lengths = [len(token) for token in told["tokens"]]
    assert told["text_offset"] == [sum(lengths[:place]) for place in range(len(lengths))]

    chat = post(endpoint, CHAT, **HELLO, max_tokens=30, seed=1, logprobs=True, top_logprobs=2, ignore_eos=True).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == 30
    special = set(tokenizer.all_special_tokens)
    shown = b"".join(bytes(one["bytes"]) for one in content if one["token"] not in special)
    assert shown.decode(errors="replace") == chat["choices"][0]["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)


def test_openai_client_chats_completes_and_streams(openai_client: openai.OpenAI) -> None:
    (card,) = openai_client.models.list().data
    assert (card.id, openai_client.models.retrieve("tiny").id) == ("tiny", "tiny")
    asked: dict[str, Any] = {**HELLO, "max_tokens": 20, "seed": 5, "temperature": 1.0}
    whole = openai_client.chat.completions.create(**asked, n=3, logprobs=True, top_logprobs=1)
    again = openai_client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3  # each choice has a seed of its own
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    other = openai_client.chat.completions.create(**asked | {"seed": 6})
    assert other.choices[0].message.content != texts[0]
    chunks = list(openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == texts[0]
    assert chunks[-1].usage.completion_tokens == len(whole.choices[0].logprobs.content)
    text = openai_client.completions.create(model="tiny", prompt="fox", max_tokens=20, temperature=0).choices[0].text
    stop = text[4:6]
    stopped = openai_client.completions.create(model="tiny", prompt="fox", max_tokens=20, temperature=0, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    with pytest.raises(openai.NotFoundError, match="there is no model 'tinny' here") as error:
        openai_client.chat.completions.create(**asked | {"model": "tinny"})
    assert error.value.code == "model_not_found"


def test_text_comes_back_from_its_tokens(endpoint: Endpoint, client: Client) -> None:
    text = "naïve <|im_end|> 🚀"
    ids = client.tokenize(text).tokens
    assert post(endpoint, "/detokenize", tokens=ids).json() == {"prompt": text}
    assert client.models()[0].max_model_len == CONTEXT_TOKENS


BAD: list[tuple[str, bytes | dict[str, Any], int, str, str | None, str]] = [
    (CHAT, b'{"model": "tiny", "messages": [', 400, "invalid_json", None, "no JSON: EOF"),
    (CHAT, b"\xff\xfe", 400, "invalid_json", None, "no JSON"),
    (CHAT, b"", 400, "invalid_json", None, "no JSON"),
    (CHAT, b"[1]", 400, "invalid_value", None, "no JSON object"),
    (CHAT, b'{"model":"tiny","prompt":' + b"[" * 40_000, 400, "invalid_json", None, "recursion"),
    (CHAT, {**HELLO, "temprature": 1}, 400, "unknown_parameter", "temprature", "did you mean 'temperature'?"),
    (CHAT, {**HELLO, "stream": True, "stream_options": {"include_usag": True}}, 400, "unknown_parameter",
     "stream_options", "did you mean 'include_usage'?"),
    (CHAT, {**HELLO, "n": 10**6}, 400, "invalid_value", "n", "less than or equal to 16"),
    (CHAT, {**HELLO, "n": 0}, 400, "invalid_value", "n", "greater than or equal to 1"),
    (CHAT, {**HELLO, "max_tokens": "ten"}, 400, "invalid_type", "max_tokens", 'valid integer (given: "ten")'),
    (CHAT, {**HELLO, "max_tokens": True}, 400, "invalid_type", "max_tokens", "valid integer"),
    (CHAT, {**HELLO, "max_tokens": 10**7}, 400, "context_length_exceeded", "max_tokens", "or less, or leave it out"),
    (CHAT, {**HELLO, "max_tokens": 5, "max_completion_tokens": 6}, 400, "invalid_value", "max_completion_tokens",
     "disagree"),
    (CHAT, {**HELLO, "temperature": -1}, 400, "invalid_value", "temperature", "greater than or equal to 0"),
    (CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":NaN}', 400, "invalid_value",
     "temperature", "finite"),
    (CHAT, {**HELLO, "seed": 2**80}, 400, "invalid_value", "seed", "less than"),
    (CHAT, {**HELLO, "top_logprobs": 3}, 400, "invalid_value", None, "goes with logprobs=true"),
    (CHAT, {**HELLO, "logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias", "'x' is no token"),
    (CHAT, {**HELLO, "logit_bias": {"": 1}}, 400, "invalid_value", "logit_bias", "'' is no token"),
    (CHAT, {**HELLO, "logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias", "'99999' is no token"),
    (CHAT, {**HELLO, "messages": []}, 400, "invalid_value", "messages", "at least 1 item"),
    (CHAT, {**HELLO, "messages": "hello"}, 400, "invalid_type", "messages", "valid array"),
    (CHAT, {**HELLO, "messages": [{"role": "robot", "content": "a"}]}, 400, "invalid_value", "messages",
     'has the role "robot"'),
    (CHAT, {**HELLO, "messages": [{"content": "a"}]}, 400, "invalid_value", "messages", "has the role null"),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400,
     "invalid_value", "messages", "is no text"),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "a\0b"}]}, 400, "invalid_value", "messages", "NUL"),
    (CHAT, {**HELLO, "tools": [{"type": "function"}]}, 400, "invalid_value", "messages", "tool 1 has no name"),
    (CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', 400, "invalid_json", None, "hex"),
    (CHAT, {"messages": HELLO["messages"]}, 400, "missing_required_parameter", "model", "model is missing"),
    (CHAT, {**HELLO, "model": "gpt-4"}, 404, "model_not_found", "model", "'tiny' is served"),
    (COMPLETE, {"model": "tiny", "prompt": [5, -1]}, 400, "invalid_value", "prompt", "prompt[1]"),
    (COMPLETE, {"model": "tiny", "prompt": [[5], [6, -1]]}, 400, "invalid_value", "prompt", "prompt[1][1]"),
    (COMPLETE, {"model": "tiny", "prompt": [10**6]}, 400, "invalid_value", "prompt", "there is no token 1000000"),
    (COMPLETE, {"model": "tiny", "prompt": [5, "a"]}, 400, "invalid_type", "prompt", "none of what it may be"),
    (COMPLETE, {"model": "tiny", "prompt": ""}, 400, "invalid_value", "prompt", "at least 1 character"),
    (COMPLETE, {"model": "tiny", "prompt": []}, 400, "invalid_value", "prompt", "at least 1 item"),
    (COMPLETE, {"model": "tiny"}, 400, "missing_required_parameter", "prompt", "prompt is missing"),
    (COMPLETE, {"model": "tiny", "prompt": [5] * CONTEXT_TOKENS}, 400, "context_length_exceeded", "prompt", "longest"),
    (COMPLETE, {"model": "tiny", "prompt": [[5]] * 100, "n": 3}, 400, "invalid_value", "prompt", "send several"),
    (COMPLETE, {"model": "tiny", "prompt": "a", "stop": ["b", ""]}, 400, "invalid_value", "stop", "stop[1]"),
    (COMPLETE, {"model": "tiny", "prompt": "a", "stream": True, "prompt_logprobs": 1}, 400, "invalid_value", None,
     "cannot be streamed"),
    (COMPLETE, {"model": "tiny", "prompt": "a", "stop_token_ids": [10**9]}, 400, "invalid_value", "stop_token_ids",
     "there is no token"),
    (COMPLETE, {"model": "tiny", "prompt": "a" * 60_000}, 413, "body_too_large", None, "50000 bytes"),
    ("/tokenize", {"model": "tiny"}, 400, "invalid_value", None, "one of the two"),
    ("/detokenize", {"model": "tiny", "tokens": [-4]}, 400, "invalid_value", "tokens", "tokens[0]"),
    ("/v1/chat/completion", HELLO, 404, "not_found", None, "did you mean '/v1/chat/completions'?"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "code", "param", "says"), BAD)
def test_bad_input_gets_openais_error(
    endpoint: Endpoint, path: str, body: bytes | dict[str, Any], status: int, code: str, param: str | None, says: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(f"{endpoint.url}{path}", content=content)
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


VALUES = [None, True, -1, 0, 1, 3.5, 1e308, 2**70, "", "a", "\0", [], [1], [-1], ["a", None], [[1], []], {}, {"a": 1}]
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *DetokenizeRequest.model_fields})


def test_no_combination_of_wrong_values_is_the_servers_fault(endpoint: Endpoint) -> None:
    draw = random.Random(0)
    statuses = set()
    with httpx.Client(base_url=endpoint.url, timeout=60) as http:
        for _ in range(150):
            path = draw.choice((CHAT, COMPLETE, "/tokenize", "/detokenize"))
            body: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
            body |= {"prompt": "fox"} if path == COMPLETE else {"messages": [{"role": "user", "content": "fox"}]}
            body |= {field: draw.choice(VALUES) for field in draw.sample(FIELDS, draw.randrange(3))}
            response = http.post(path, content=json.dumps(body))
            assert response.status_code in (200, 400, 404), (path, body, response.text)
            statuses.add(response.status_code)
    assert {200, 400} <= statuses


def test_requests_that_break_off_are_nobodys_fault(endpoint: Endpoint) -> None:
    body = json.dumps(HELLO).encode()
    raw = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    for length in range(1, len(raw), 9):
        with socket.create_connection(endpoint.address, timeout=60) as connection:
            connection.sendall(raw[:length])
    counters = endpoint.counters()
    assert counters["llmtrain_requests_total", CHAT, "499"] > 0
    assert not [key for key in counters if key[0] == "llmtrain_requests_total" and key[2].startswith("5")]


def test_wrong_methods_and_other_pages(endpoint: Endpoint) -> None:
    wrong = httpx.get(f"{endpoint.url}{CHAT}")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "Method Not Allowed" in wrong.json()["error"]["message"]
    for page in ("/", "/info", "/docs", "/openapi.json", "/v1/models/other"):
        assert httpx.get(f"{endpoint.url}{page}").status_code == 404


def test_a_body_without_end_is_refused_where_it_is_too_large(endpoint: Endpoint) -> None:
    """Chunk after chunk, without a length: the answer comes, and then the end of the connection."""
    with socket.create_connection(endpoint.address, timeout=60) as connection:
        connection.sendall(f"POST {COMPLETE} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(60):
            connection.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        answer = b""
        while part := connection.recv(4096):  # ends: the server does not wait for the rest
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "body_too_large"


def test_ten_megabytes_are_refused_while_they_are_sent(endpoint: Endpoint) -> None:
    response = httpx.post(f"{endpoint.url}{COMPLETE}", content=b"a" * 10_000_000)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_client_that_leaves_costs_nothing_more(endpoint: Endpoint) -> None:
    endpoint.until(lambda said: said["running"] == 0)
    before = endpoint.counters()
    stream = endpoint.begin(COMPLETE, LONG)
    stream.getresponse().readline()
    stream.close()
    whole = endpoint.begin(COMPLETE, LONG.replace(b', "stream": true', b""))
    endpoint.until(lambda said: said["running"] == 1)
    whole.close()
    endpoint.until(lambda said: said["running"] == 0)
    after = endpoint.counters()
    generated = ("llmtrain_generation_tokens_total",)
    assert after[generated] - before[generated] < 4000  # of 8,000
    assert endpoint.counters()[generated] == after[generated]
    assert after["llmtrain_cancelled_total",] - before["llmtrain_cancelled_total",] == 2


def test_a_client_that_leaves_while_its_prompt_is_fed(endpoint: Endpoint) -> None:
    before = endpoint.counters()["llmtrain_prompt_tokens_total",]
    body = json.dumps({"model": "tiny", "prompt": [7] * 4000, "max_tokens": 50}).encode()
    connection = endpoint.begin(COMPLETE, body)
    endpoint.until(lambda said: said["running"] == 1)
    connection.close()
    endpoint.until(lambda said: said["running"] == 0)
    assert endpoint.counters()["llmtrain_prompt_tokens_total",] == before  # it was not fed to its end


def test_full_queues_say_so_and_clients_leave_them(endpoint: Endpoint, client: Client) -> None:
    places = [endpoint.begin(COMPLETE, LONG) for _ in range(MAX_SEQUENCES)]
    endpoint.until(lambda said: said["running"] == MAX_SEQUENCES)
    waiting = [endpoint.begin(COMPLETE, LONG) for _ in range(MAX_WAITING)]
    endpoint.until(lambda said: said["waiting"] == MAX_WAITING)
    refused = post(endpoint, COMPLETE, prompt="fox")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "queue_full"
    with pytest.raises(EngineUnavailable, match="40 requests wait already"):
        client.complete("fox")
    assert endpoint.health()[0] == 200  # busy is not ill
    for connection in waiting:
        connection.close()
    endpoint.until(lambda said: said["waiting"] == 0)
    for connection in places:
        connection.close()
    endpoint.until(lambda said: said["running"] == 0)


def test_thirty_two_clients_a_third_of_which_leave(endpoint: Endpoint) -> None:
    """The others' answers are those of each alone."""
    prompts = [[place + 5, 2 * place + 7, 9] for place in range(32)]
    sampling = Sampling(max_tokens=24, temperature=1.0, seed=4, ignore_eos=True)

    def ask(place: int) -> tuple[int, ...]:
        with Client(endpoint.url, model="tiny") as client:
            stream = client.stream_complete(prompts[place], sampling, token_ids=True)
            if place % 3 == 1:
                next(stream)
                return ()
            return tuple(token for piece in stream for token in piece.token_ids or ())

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == [ask(place) for place in range(32)]
    assert all(len(ids) == 24 for place, ids in enumerate(together) if place % 3 != 1)
    counters = endpoint.counters()
    assert not [key for key in counters if key[0] == "llmtrain_requests_total" and key[2].startswith("5")]


def test_a_stopped_engine_is_ill_until_it_goes_on(endpoint: Endpoint, client: Client) -> None:
    os.kill(endpoint.engine_pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.complete, "fox", Sampling(max_tokens=3))
            said = endpoint.until(lambda said: said["status"] != "ok")
            assert "no token was computed for" in said["status"]
            assert endpoint.health()[0] == 503
            os.kill(endpoint.engine_pid, signal.SIGCONT)
            assert answer.result()
            endpoint.until(lambda said: said["status"] == "ok")
    finally:
        os.kill(endpoint.engine_pid, signal.SIGCONT)


def test_an_idle_engine_that_is_silent_is_ill(endpoint: Endpoint) -> None:
    os.kill(endpoint.engine_pid, signal.SIGSTOP)
    try:
        assert "nothing was heard" in endpoint.until(lambda said: said["status"] != "ok")["status"]
    finally:
        os.kill(endpoint.engine_pid, signal.SIGCONT)
    endpoint.until(lambda said: said["status"] == "ok")


def test_a_killed_engine_ends_the_endpoint(repository: Path, model_directory: Path, tmp_path: Path) -> None:
    with serving(repository, model_directory, tmp_path) as endpoint:
        engine = endpoint.engine_pid
        stream = endpoint.begin(COMPLETE, LONG).getresponse()
        stream.readline()
        whole = endpoint.begin(COMPLETE, LONG.replace(b', "stream": true', b""))
        endpoint.until(lambda said: said["running"] == 2)
        os.kill(engine, signal.SIGKILL)
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        assert "the engine ended by signal 9" in json.loads(last.removeprefix("data: "))["error"]["message"]
        answer = whole.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "unavailable")
        assert endpoint.process.wait(60) == 3
        assert "the engine ended by signal 9 while it served" in endpoint.process.stdout.read()


def test_sigterm_under_load_answers_what_is_under_way(repository: Path, model_directory: Path, tmp_path: Path) -> None:
    with serving(repository, model_directory, tmp_path) as endpoint, Client(endpoint.url) as client:
        engine, one_has_come = endpoint.engine_pid, threading.Event()
        client.served()

        def ask(_: int) -> int:
            number = 0
            sampling = Sampling(max_tokens=300, ignore_eos=True)
            for piece in client.stream_complete("fox", sampling, token_ids=True):
                one_has_come.set()
                number += len(piece.token_ids or ())
            return number

        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, place) for place in range(8)]
            one_has_come.wait(60)
            endpoint.until(lambda said: said["running"] == 8)
            os.kill(endpoint.process.pid, signal.SIGTERM)
            endpoint.until(lambda said: "takes no new requests" in said["status"])
            assert post(endpoint, COMPLETE, prompt="fox").status_code == 503
            assert [answer.result() for answer in answers] == [300] * 8
        assert endpoint.process.wait(60) == 0
        assert "all requests were answered" in endpoint.process.stdout.read()
        ends(engine)
    (metrics,) = tmp_path.glob("serving/*/*/metrics.jsonl")
    told = json.loads(metrics.read_text().splitlines()[-1])
    assert told["serving/generation_tokens"] == 2400


@pytest.mark.campaign
def test_the_benchmark_runs(repository: Path, model_directory: Path, tmp_path: Path) -> None:
    script = f"{sys.executable} {repository}/bench/serving.py {model_directory} --json {tmp_path}/found.json"
    done = shell(f"{script} --concurrent 1 3 --rounds 1 --requests 3 --tokens 4 --threads 1", repository)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found.keys() == {"serving 1", "serving 3"}
    assert all(one["requests_per_second"] > 0 for both in found.values() for side in both.values() for one in side)


@pytest.mark.campaign
def test_a_second_signal_cuts_short(repository: Path, model_directory: Path, tmp_path: Path) -> None:
    with serving(repository, model_directory, tmp_path) as endpoint:
        stream = endpoint.begin(COMPLETE, LONG).getresponse()
        stream.readline()
        os.kill(endpoint.process.pid, signal.SIGINT)
        endpoint.until(lambda said: "takes no new requests" in said["status"])
        os.kill(endpoint.process.pid, signal.SIGTERM)
        last = [line for line in stream.read().decode().splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert endpoint.process.wait(60) == 75


def test_models_that_do_not_load_are_said_in_one_message(model_directory: Path, tmp_path: Path) -> None:
    (broken := tmp_path / "broken").mkdir()
    for path in model_directory.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:2000] if path.suffix == ".safetensors" else content)
    settings = ["serving=litserve", "serving.port=0", "infra.threads=1", "tracking=none"]
    composer = Composer((), "serve", root=ServeConfig)
    config = composer.check([f"run={broken}", f"outputs_dir={tmp_path}", *settings]).good()
    with pytest.raises(EngineFailed, match=r"broken is not loaded: SafetensorError: .*litserve\.log says where"):
        serve(config, say=lambda line: None)


def test_refusals_of_the_client_name_the_field(client: Client) -> None:
    with pytest.raises(RequestRefused, match="max_tokens=9999 are more than") as error:
        client.complete("fox", Sampling(max_tokens=9999))
    assert (error.value.status, error.value.code) == (400, "context_length_exceeded")


def test_the_engine_ends_with_a_killed_parent(endpoint: Endpoint) -> None:
    """The last test of the file: it ends the endpoint of the others."""
    engine = endpoint.engine_pid
    endpoint.begin(COMPLETE, LONG).getresponse().readline()
    os.kill(endpoint.process.pid, signal.SIGKILL)
    ends(engine)
