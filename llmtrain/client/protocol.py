"""What goes over the wire: OpenAI's completions and chat completions, with the extensions that vLLM made.

Engines of ours validate requests with these classes, and the client builds its requests from them, so the two cannot
disagree. Extensions, all vLLM's: `top_k`, `ignore_eos`, `stop_token_ids`, `return_token_ids`, `prompt_logprobs`,
`POST /tokenize` and `/detokenize`. An answer's classes ignore fields that they do not know: engines say more than is
asked of them.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
"""Largest `n`: each choice is a sequence of its own to compute."""
MOST_LOGPROBS = 20
"""Most alternatives a token; OpenAI's limit."""

TokenId = Annotated[int, Ge(0)]
Ids = Annotated[tuple[TokenId, ...], Field(fail_fast=True)]
Text = Annotated[str, MinLen(1)]
Texts = Annotated[tuple[Text, ...], Field(fail_fast=True)]


class Request(BaseModel):
    """What completions and chats share. Unknown fields are refused: a misspelt one would be dropped without a word."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: str
    """The served model's name, as `GET /v1/models` gives it."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens to generate; null: what the context has room for, at most the engine's own default."""
    temperature: Annotated[float, Ge(0), Le(2)] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(-1)] = 0
    """0 or -1: all tokens."""
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    """Equal seeds give equal tokens for the same request on the same engine."""
    n: Annotated[int, Ge(1), Le(MOST_CHOICES)] = 1
    stop: str | Annotated[Texts, MaxLen(16)] | None = None
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: Annotated[Ids, MaxLen(64)] = ()
    """Tokens that end the answer, beside the model's own."""
    ignore_eos: bool = False
    """Go on after the model's own end tokens: for measurements of speed."""
    presence_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    logit_bias: dict[str, Annotated[float, Ge(-100), Le(100)]] | None = None
    """By token id, as text."""
    stream: bool = False
    stream_options: "StreamOptions | None" = None
    return_token_ids: bool = False
    """Give `prompt_token_ids` and each choice's `token_ids`."""
    prompt_logprobs: Annotated[int, Ge(0), Le(MOST_LOGPROBS)] | None = None
    """The log-probability of each token of the prompt, and of so many likeliest in its place. Not with `stream`."""
    user: str | None = None
    """Accepted, not used."""

    @model_validator(mode="after")
    def fits_a_stream(self) -> "Request":
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; set stream=false")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop`, as texts."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    include_usage: bool = False
    """Send a last chunk with `usage` and without choices."""


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[Ids, MinLen(1)]
        | Annotated[Texts, MinLen(1)]
        | Annotated[tuple[Annotated[Ids, MinLen(1)], ...], Field(fail_fast=True), MinLen(1)]
    )
    """A text, token ids, or several of either, each of which gives `n` choices."""
    logprobs: Annotated[int, Ge(0), Le(MOST_LOGPROBS)] | None = None
    """Give each generated token's log-probability, and those of so many likeliest."""
    echo: bool = False
    """Put the prompt in front of the answer."""


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    """Turns with `role` and `content`; what else they may hold is the chat template's affair."""
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Ge(0), Le(MOST_LOGPROBS)] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    """Shown to the model by the chat template; what it answers stays text."""

    @model_validator(mode="after")
    def logprobs_go_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        return self


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: the ids of a text, or of messages as the chat template renders them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of the two")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`: the text of token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    tokens: Ids


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int | None = 0
    total_tokens: int


class PromptLogprob(Answer):
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class Logprobs(Answer):
    """Of a completion's tokens, OpenAI's old form: lists of equal length."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...] | None = None
    text_offset: tuple[int, ...] = ()


class CompletionChoice(Answer):
    index: int
    text: str
    finish_reason: str | None = None
    """`stop`, `length`; null while a stream goes on."""
    logprobs: Logprobs | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[dict[str, PromptLogprob] | None, ...] | None = None
    """For each token of the prompt a dictionary by token id: itself and the likeliest; null for the first."""


class CompletionAnswer(Answer):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


class ChatLogprob(TopLogprob):
    top_logprobs: tuple[TopLogprob, ...] = ()


class ChatLogprobs(Answer):
    content: tuple[ChatLogprob, ...] | None = None


class Message(Answer):
    role: str | None = None
    content: str | None = None


class ChatChoice(Answer):
    index: int
    message: Message | None = None
    """Of a whole answer."""
    delta: Message | None = None
    """Of a chunk of a stream."""
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: tuple[int, ...] | None = None


class ChatAnswer(Answer):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[dict[str, PromptLogprob] | None, ...] | None = None


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: tuple[int, ...]


class DetokenizeAnswer(Answer):
    prompt: str


class ModelCard(Answer):
    id: str
    owned_by: str | None = None
    """Who made the engine: `vllm`, or `llmtrain`."""
    root: str | None = None
    """Directory of what is served: as in ServedModel, or absolute."""
    max_model_len: int | None = None
    """Longest context, in tokens."""


class ModelList(Answer):
    data: tuple[ModelCard, ...]


class ErrorBody(Answer):
    """OpenAI's form of an error: `{"error": {...}}`, also as an event in a stream that fails."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


Kind = Literal["completion", "chat"]
