"""From a request's body to jobs: the chat template, the tokenizer, and what the model's context has room for."""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from llmtrain.artifacts import ServedModel
from llmtrain.client.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Kind,
    Request,
    TokenizeRequest,
)
from llmtrain.data.chat_template import ChatTemplate
from llmtrain.data.messages import BadMessage, plain_messages, tools_of
from llmtrain.data.tokenizer import decode_text, encode_rendered_chats
from llmtrain.serving.http_errors import Refused, parsed
from llmtrain.serving.jobs import Choosing, Job

MOST_SEQUENCES = 256
"""Most sequences of one request: prompts times `n`."""


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    text: str
    """As it was given, or as its ids are decoded; empty where only ids are there and no echo was asked for."""


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    kind: Kind
    request: CompletionRequest | ChatRequest
    prompts: tuple[Prompt, ...]
    logprobs: int | None
    """Alternatives a generated token; None: not even its own log-probability was asked for."""
    echo: bool
    jobs: tuple[Job, ...]
    """`n` for each prompt: choice `i` answers prompt `i // n`."""

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.request.n]


@dataclass(frozen=True)
class Reader:
    """Every method raises Refused for what cannot be answered. For one thread: the tokenizer is not made for more."""

    tokenizer: Any
    served: ServedModel
    default_max_tokens: int
    vocab_size: int
    """Columns of the logits."""
    template: ChatTemplate | None

    def asked(self, kind: Kind, body: bytes) -> Asked:
        return self._chat(parsed(ChatRequest, body)) if kind == "chat" else (
            self._completion(parsed(CompletionRequest, body))
        )  # fmt: skip

    def tokenize(self, body: bytes) -> tuple[int, ...]:
        """The ids that a request with the same text or messages is answered from."""
        request = parsed(TokenizeRequest, body)
        self._check_model(request.model)
        if request.messages is not None:
            if request.add_special_tokens:
                message = "the chat template writes the special tokens; leave add_special_tokens out"
                raise bad(message, "add_special_tokens")
            return self._chat_ids(request.messages, request.tools, request.add_generation_prompt)
        assert request.prompt is not None, "the request has one of the two"
        return self._text_ids(request.prompt, request.add_special_tokens)

    def detokenize(self, body: bytes) -> str:
        request = parsed(DetokenizeRequest, body)
        self._check_model(request.model)
        self._check_ids("tokens", request.tokens)
        return decode_text(self.tokenizer, request.tokens)

    def _chat(self, request: ChatRequest) -> Asked:
        self._check_model(request.model)
        long, short = request.max_completion_tokens, request.max_tokens
        if long is not None and short is not None and long != short:
            message = f"max_completion_tokens={long} and max_tokens={short} disagree; give one of them"
            raise bad(message, "max_completion_tokens")
        prompt = Prompt(self._chat_ids(request.messages, request.tools, add_generation_prompt=True), "")
        wanted = ("max_completion_tokens", long) if long is not None else ("max_tokens", short)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._jobs("chat", request, (prompt,), wanted, logprobs, echo=False)

    def _completion(self, request: CompletionRequest) -> Asked:
        self._check_model(request.model)
        prompts = tuple(self._prompt(prompt, request.echo) for prompt in several(request.prompt))
        return self._jobs(
            "completion", request, prompts, ("max_tokens", request.max_tokens), request.logprobs, echo=request.echo
        )

    def _prompt(self, given: str | tuple[int, ...], echo: bool) -> Prompt:
        if not isinstance(given, str):
            self._check_ids("prompt", given)
            return Prompt(given, decode_text(self.tokenizer, given) if echo else "")
        ids = self._text_ids(given, add_special_tokens=True)  # as the tokenizer itself does
        if not ids:
            raise bad(f"the tokenizer makes no token of the prompt {given[:40]!r}", "prompt")
        return Prompt(ids, given)

    def _chat_ids(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """Messages and tools are read as training reads them, and nothing is added to what the template writes."""
        if self.template is None:
            message = f"the tokenizer of '{self.served.name}' has no chat template; ask /v1/completions with a text"
            raise bad(message, "messages", "no_chat_template")
        try:
            plain = plain_messages(list(messages), "messages", may_be_empty=True)
            text = self.template.text(plain, tools_of(list(tools or ())), add_generation_prompt)
        except BadMessage as error:
            raise bad(f"the chat {error}" if str(error).startswith("has ") else str(error), "messages") from error
        return tuple(encode_rendered_chats(self.tokenizer, [text])[0])

    def _text_ids(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _jobs(
        self,
        kind: Kind,
        request: CompletionRequest | ChatRequest,
        prompts: tuple[Prompt, ...],
        wanted: tuple[str, int | None],
        logprobs: int | None,
        echo: bool,
    ) -> Asked:
        if len(prompts) * request.n > MOST_SEQUENCES:
            message = (
                f"{len(prompts)} prompts with n={request.n} are {len(prompts) * request.n} answers, of which one "
                f"request may ask {MOST_SEQUENCES}; send several"
            )
            raise bad(message, "prompt")
        bias = self._bias(request)
        self._check_ids("stop_token_ids", request.stop_token_ids)
        own_stops = () if request.ignore_eos else self.served.stop_ids
        scored = [k for k in (request.prompt_logprobs, logprobs if echo else None) if k is not None]
        jobs = [
            Job(
                ids=prompt.ids,
                max_tokens=self._max_tokens(prompt, *wanted),
                choosing=choosing(request, number, bias),
                stops=request.stops,
                stop_ids=frozenset((*own_stops, *request.stop_token_ids)),
                logprobs=logprobs,
                prompt_logprobs=max(scored, default=None),
            )
            for prompt in prompts
            for number in range(request.n)
        ]
        return Asked(kind, request, prompts, logprobs, echo, tuple(jobs))

    def _max_tokens(self, prompt: Prompt, field: str, wanted: int | None) -> int:
        context, room = self.served.context_tokens, self.served.context_tokens - len(prompt.ids)
        if room < 1:
            message = f"the prompt has {len(prompt.ids)} tokens; with one to answer, {context} is the longest context"
            raise bad(message, "prompt", "context_length_exceeded")
        if wanted is None:
            return min(room, self.default_max_tokens)
        if wanted > room:
            message = (
                f"{len(prompt.ids)} tokens of the prompt and {field}={wanted} are more than the {context} of the "
                f"context; set {field}={room} or less, or leave it out"
            )
            raise bad(message, field, "context_length_exceeded")
        return wanted

    def _bias(self, request: Request) -> dict[int, float]:
        given = request.logit_bias or {}
        for name in given:
            if not (name.isascii() and name.isdecimal()) or len(name) > len(str(self.vocab_size)):
                raise bad(f"logit_bias: {name[:40]!r} is no token of this model", "logit_bias")
        self._check_ids("logit_bias", [int(name) for name in given])
        return {int(name): bias for name, bias in given.items()}

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        wrong = next((one for one in ids if one >= self.vocab_size), None)
        if wrong is not None:
            raise bad(f"{field}: there is no token {wrong}; the largest is {self.vocab_size - 1}", field)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"there is no model '{name[:200]}' here; '{self.served.name}' is served"
            raise Refused(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")


def reader_of(tokenizer: Any, served: ServedModel, default_max_tokens: int, vocab_size: int) -> Reader:
    template = ChatTemplate(tokenizer) if tokenizer.chat_template is not None else None
    return Reader(tokenizer, served, default_max_tokens, vocab_size, template)


def bad(message: str, param: str, code: str = "invalid_value") -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def several(prompt: str | tuple[Any, ...]) -> Sequence[str | tuple[int, ...]]:
    """The prompts of a completion: it is one, or some."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def choosing(request: Request, number: int, bias: dict[int, float]) -> Choosing:
    """Of the choice of that number: each has a seed of its own, as in vLLM."""
    return Choosing(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k),
        seed=None if request.seed is None else request.seed + number,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=bias,
    )
