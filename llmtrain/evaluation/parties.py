"""Those who answer the probes: weights in this process, a server's runtime in this process, an endpoint."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from llmtrain.client.client import Client, Sampling, Scores
from llmtrain.data.messages import plain_messages
from llmtrain.errors import RequestRefused
from llmtrain.evaluation.probes import Row

ONE_TOKEN = Sampling(max_tokens=1, temperature=0.0)
AT_ONCE = 8
"""Requests under way at an endpoint."""


class Party(Protocol):
    """A form of the model, with the tokenizer and the template that it is served with."""

    @property
    def label(self) -> str:
        """What people call it."""
        ...

    def scores(self, rows: Sequence[Sequence[int]]) -> list[Scores]:
        """Of each row of token ids."""
        ...

    def ids(self, row: Row) -> Sequence[int]:
        """What it makes of a row's text or messages. Raises RequestRefused where it will not."""
        ...

    def fed(self, row: Row) -> Sequence[int]:
        """What its model is really fed when it is asked to go on."""
        ...

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...


@dataclass(frozen=True)
class InProcess:
    """A tokenizer, and a function that scores."""

    label: str
    tokenizer: Any
    scorer: Callable[[Sequence[Sequence[int]]], list[Scores]]

    def scores(self, rows: Sequence[Sequence[int]]) -> list[Scores]:
        return self.scorer(rows)

    def ids(self, row: Row) -> Sequence[int]:
        """As servers do: a text with what the tokenizer adds to one, messages with nothing but the template's."""
        if row.text is not None:
            return list(self.tokenizer(row.text)["input_ids"])
        probe = row.probe
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(plain_messages(list(probe.messages), probe.name)),
                tools=list(probe.tools) or None,
                add_generation_prompt=probe.asks,
                tokenize=False,
            )
        except (TemplateError, ValueError) as error:  # ValueError: there is no template
            raise RequestRefused(f"{self.label}: {error}", 400, None) from error
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def fed(self, row: Row) -> Sequence[int]:
        return self.ids(row)

    def decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids))


@dataclass(frozen=True)
class Endpoint:
    """What answers at a URL. Its methods raise what `Client` does."""

    label: str
    client: Client

    def scores(self, rows: Sequence[Sequence[int]]) -> list[Scores]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.client.score, rows))

    def ids(self, row: Row) -> Sequence[int]:
        if row.text is not None:
            return self.client.tokenize(row.text).tokens
        probe = row.probe
        answer = self.client.tokenize(
            messages=probe.messages, tools=probe.tools or None, add_generation_prompt=probe.asks
        )
        return answer.tokens

    def fed(self, row: Row) -> Sequence[int]:
        if row.text is not None:
            (written,) = self.client.complete(row.text, ONE_TOKEN, token_ids=True)
        else:
            (written,) = self.client.chat(row.probe.messages, ONE_TOKEN, token_ids=True)
        if written.prompt_token_ids is None:
            raise RequestRefused(f"{self.label} does not say which tokens it feeds its model", 200, None)
        return written.prompt_token_ids

    def decoded(self, ids: Sequence[int]) -> str:
        return self.client.detokenize(ids)
