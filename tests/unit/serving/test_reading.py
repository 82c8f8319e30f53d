"""Requests become jobs: template, tokens, limits."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtrain.artifacts import ServedModel
from llmtrain.data.tokenizer import collect_characters, load_tokenizer
from llmtrain.serving.http_errors import Refused
from llmtrain.serving.jobs import Choosing
from llmtrain.serving.reading import Reader, reader_of

SERVED = ServedModel(
    parents=(), label="m@1.0.0", name="m", form="trained", path="m", weights_sha256="0", precision="fp32",
    context_tokens=100, stop_ids=(3, 4), template_sha256=None,
)  # fmt: skip
MESSAGES = [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": ""}]


@pytest.fixture(scope="module")
def reader(bpe: Any) -> Reader:
    return reader_of(bpe, SERVED, default_max_tokens=30, vocab_size=400)


def read(reader: Reader, kind: Any, **body: Any) -> Any:
    return reader.asked(kind, json.dumps({"model": "m"} | body).encode())


def refusal(reader: Reader, kind: Any, **body: Any) -> Refused:
    with pytest.raises(Refused) as error:
        read(reader, kind, **body)
    return error.value


def test_chats_have_the_tokens_that_transformers_gives(reader: Reader, bpe: Any) -> None:
    (job,) = read(reader, "chat", messages=MESSAGES).jobs
    assert list(job.ids) == bpe.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]


def test_special_tokens_are_added_once_in_a_chat_and_as_the_tokenizer_does_in_a_text(bpe_directory: Any) -> None:
    """A tokenizer that begins every text with a token, which its template writes too."""
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(bpe_directory)
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    reader = reader_of(tokenizer, SERVED, 30, 400)
    (chat,) = read(reader, "chat", messages=MESSAGES).jobs
    assert chat.ids[0] == begin != chat.ids[1]
    (text,) = read(reader, "completion", prompt="fox").jobs
    plain = reader.tokenize(b'{"prompt": "fox"}')
    assert text.ids == (begin, *plain) == reader.tokenize(b'{"prompt": "fox", "add_special_tokens": true}')


def test_without_a_template_only_completions_are_answered(tmp_path: Any) -> None:
    collect_characters(["the fox"], tmp_path)
    reader = reader_of(load_tokenizer(tmp_path), SERVED, 30, 9)
    found = refusal(reader, "chat", messages=MESSAGES)
    assert (found.status, found.code) == (400, "no_chat_template")
    assert "ask /v1/completions" in found.message
    assert len(read(reader, "completion", prompt="fox").jobs[0].ids) == 3


def test_answers_have_the_room_that_the_context_leaves(reader: Reader) -> None:
    lengths = [read(reader, "completion", prompt=[5] * size).jobs[0].max_tokens for size in (10, 80, 99)]
    assert lengths == [30, 20, 1]
    assert read(reader, "completion", prompt=[5] * 80, max_tokens=20).jobs[0].max_tokens == 20
    found = refusal(reader, "completion", prompt=[5] * 80, max_tokens=21)
    assert (found.param, found.code) == ("max_tokens", "context_length_exceeded")
    assert "set max_tokens=20 or less" in found.message
    assert refusal(reader, "completion", prompt=[5] * 100).param == "prompt"
    assert read(reader, "chat", messages=MESSAGES, max_completion_tokens=7).jobs[0].max_tokens == 7
    assert refusal(reader, "chat", messages=MESSAGES, max_completion_tokens=99).param == "max_completion_tokens"


def test_every_choice_of_every_prompt_is_a_job(reader: Reader) -> None:
    asked = read(reader, "completion", prompt=[[5], [6, 7]], n=2, seed=9, temperature=0.5, top_k=-1, stop="x")
    assert [job.ids for job in asked.jobs] == [(5,), (5,), (6, 7), (6, 7)]
    assert [job.choosing for job in asked.jobs] == 2 * [
        Choosing(temperature=0.5, top_k=0, seed=9),
        Choosing(temperature=0.5, top_k=0, seed=10),
    ]
    assert {job.stops for job in asked.jobs} == {("x",)}
    assert asked.prompt_of(3).ids == (6, 7)


def test_the_models_end_tokens_end_answers_unless_they_are_ignored(reader: Reader) -> None:
    def stops(**body: Any) -> frozenset[int]:
        found: frozenset[int] = read(reader, "completion", prompt="fox", **body).jobs[0].stop_ids
        return found

    assert stops(stop_token_ids=[8]) == {3, 4, 8}
    assert stops(stop_token_ids=[8], ignore_eos=True) == {8}


def test_log_probabilities_are_asked_for_where_they_are_shown(reader: Reader) -> None:
    def wanted(kind: Any, **body: Any) -> tuple[int | None, int | None]:
        (job,) = read(reader, kind, **body).jobs
        return job.logprobs, job.prompt_logprobs

    assert wanted("completion", prompt="fox") == (None, None)
    assert wanted("completion", prompt="fox", logprobs=2) == (2, None)
    assert wanted("completion", prompt="fox", logprobs=2, echo=True) == (2, 2)
    assert wanted("completion", prompt="fox", prompt_logprobs=1, echo=True) == (None, 1)
    assert wanted("chat", messages=MESSAGES, logprobs=True) == (0, None)
    assert wanted("chat", messages=MESSAGES, logprobs=True, top_logprobs=5) == (5, None)


def test_what_the_template_would_drop_is_refused(bpe_directory: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bpe_directory)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    reader = reader_of(tokenizer, SERVED, 30, 400)
    found = refusal(reader, "chat", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert found.message == "the chat has tools, which the chat template does not show"


def test_templates_that_refuse_say_why(bpe_directory: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bpe_directory)
    tokenizer.chat_template = "{{ raise_exception('system comes first') }}"
    found = refusal(reader_of(tokenizer, SERVED, 30, 400), "chat", messages=MESSAGES)
    assert (found.status, found.message) == (400, "the chat template refuses it: system comes first")
