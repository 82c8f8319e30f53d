"""From pieces of jobs to OpenAI's answers and chunks, with vLLM's extensions."""

import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from llmtrain.client.protocol import ChatRequest
from llmtrain.serving.jobs import Piece, TokenLogprob
from llmtrain.serving.reading import Asked

Json = dict[str, Any]

LEAST_LOGPROB = -9999.0
"""What vLLM says for minus infinity, which JSON has not."""


class Tokens:
    """What single tokens stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = _byte_alphabet() if is_byte_level(tokenizer) else None
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        self.text = cache(self._text)
        """The text of a token alone; bytes that are no whole character show as U+FFFD."""
        self.utf8 = cache(self._utf8)
        """The bytes of a token: those of several joined are the text's, also where one holds part of a character."""

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _utf8(self, token: int) -> list[int]:
        letters = self._tokenizer.convert_ids_to_tokens(token)
        if self._bytes_of is None or token in self._added or not letters:
            return list(self.text(token).encode())
        return [self._bytes_of[letter] for letter in letters]


def is_byte_level(tokenizer: Any) -> bool:
    """Whether its tokens are bytes written as letters, as in GPT-2's."""
    return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


def joined(pieces: Sequence[Piece]) -> Piece:
    """One job's pieces as one."""
    return Piece(
        pieces[0].key,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(one for piece in pieces for one in piece.logprobs),
        next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
        pieces[-1].finish_reason,
    )


class AnswerWriter:
    """Writes the answer to one request: `whole`, or `chunk` after `chunk` and `last`."""

    def __init__(self, asked: Asked, tokens: Tokens, uid: str) -> None:
        self._asked, self._tokens = asked, tokens
        self._is_chat = isinstance(asked.request, ChatRequest)
        self._num_generated = 0
        self._offsets = [0] * len(asked.jobs)
        """Characters before a choice's next token."""
        self._begun = [False] * len(asked.jobs)
        kind = "chat.completion" if self._is_chat else "text_completion"
        self._head: Json = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uid}",
            "object": kind,
            "created": int(time.time()),
            "model": asked.request.model,
        }

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> Json:
        """`pieces`: of each job, in the order of the jobs."""
        answers = [joined(of_one) for of_one in pieces]
        self._num_generated = sum(len(answer.token_ids) for answer in answers)
        choices = [self._choice(index, answer, "message") for index, answer in enumerate(answers)]
        answer = self._head | {"choices": choices, "usage": self._usage()}
        if self._is_chat and self._asked.request.return_token_ids:
            answer["prompt_token_ids"] = self._asked.prompts[0].ids
        if self._is_chat and self._asked.request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(0, answers[0])
        return answer

    def chunk(self, index: int, piece: Piece) -> Iterator[Json]:
        """What is to be sent of a piece: nothing while its text is held back and nothing else was asked for."""
        self._num_generated += len(piece.token_ids)
        request, first = self._asked.request, not self._begun[index]
        if not (first or piece.text or piece.finish_reason or piece.logprobs or request.return_token_ids):
            return
        choice = self._choice(index, piece, "delta")
        self._begun[index] = True
        chunk = self._chunk_head | {"choices": [choice]} | ({"usage": None} if self._with_usage else {})
        if self._is_chat and first and request.return_token_ids:
            chunk["prompt_token_ids"] = self._asked.prompts[0].ids
        yield chunk

    def last(self) -> Iterator[Json]:
        """The chunk after all choices, where `usage` was asked for."""
        if self._with_usage:
            yield self._chunk_head | {"choices": [], "usage": self._usage()}

    @property
    def _chunk_head(self) -> Json:
        return self._head | ({"object": "chat.completion.chunk"} if self._is_chat else {})

    @property
    def _with_usage(self) -> bool:
        options = self._asked.request.stream_options
        return options is not None and options.include_usage

    def _usage(self) -> Json:
        num_prompt = sum(len(prompt.ids) for prompt in self._asked.prompts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_generated,
            "total_tokens": num_prompt + self._num_generated,
        }

    def _choice(self, index: int, piece: Piece, field: str) -> Json:
        choice: Json = {"index": index}
        if self._is_chat:
            role = {"role": "assistant"} if field == "message" or not self._begun[index] else {}
            choice |= {field: role | {"content": piece.text}, "logprobs": self._chat_logprobs(piece)}
        else:
            choice |= self._completion_fields(index, piece)
        choice["finish_reason"] = piece.finish_reason
        if self._asked.request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _completion_fields(self, index: int, piece: Piece) -> Json:
        asked, prompt = self._asked, self._asked.prompt_of(index)
        echoed = asked.echo and not self._begun[index]
        fields: Json = {"text": prompt.text + piece.text if echoed else piece.text, "logprobs": None}
        if asked.logprobs is not None:
            ids, found = [*piece.token_ids], list[TokenLogprob | None](piece.logprobs)
            if echoed:
                ids, found = [*prompt.ids, *ids], [None, *(piece.prompt_logprobs or ()), *found]
            fields["logprobs"] = self._old_logprobs(index, ids, found, asked.logprobs)
        if asked.request.return_token_ids and not self._begun[index]:
            fields["prompt_token_ids"] = prompt.ids
        if asked.request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs(index, piece)
        return fields

    def _old_logprobs(
        self, index: int, ids: Sequence[int], found: Sequence[TokenLogprob | None], num_top: int
    ) -> Json:  # fmt: skip
        """A completion's form: lists. Of alternatives with equal text the likeliest is given."""
        texts = [self._tokens.text(token) for token in ids]
        *offsets, self._offsets[index] = accumulate(map(len, texts), initial=self._offsets[index])
        top: list[dict[str, float] | None] = []
        for one in found:
            if one is None:
                top.append(None)
                continue
            likeliest: dict[str, float] = {}
            for token, logprob in (*one.top[:num_top], (one.id, one.logprob)):
                likeliest.setdefault(self._tokens.text(token), finite(logprob))
            top.append(likeliest)
        own = [None if one is None else finite(one.logprob) for one in found]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}

    def _chat_logprobs(self, piece: Piece) -> Json | None:
        """A chat's form: an object a token."""
        num_top = self._asked.logprobs
        if num_top is None:
            return None

        def one(token: int, logprob: float) -> Json:
            return {
                "token": self._tokens.text(token),
                "logprob": finite(logprob),
                "bytes": self._tokens.utf8(token),
            }

        content = [
            one(found.id, found.logprob) | {"top_logprobs": [one(*other) for other in found.top[:num_top]]}
            for found in piece.logprobs
        ]
        return {"content": content}

    def _prompt_logprobs(self, index: int, piece: Piece) -> list[Json | None]:
        """vLLM's form: by token id, the prompt's own token first; null for the first token, which follows nothing."""
        num_top = self._asked.request.prompt_logprobs
        shown: list[Json | None] = [None]
        for found in piece.prompt_logprobs or ():
            alternatives = {found.id: (found.logprob, found.rank)}
            for rank, (token, logprob) in enumerate(found.top[:num_top], start=1):
                alternatives.setdefault(token, (logprob, rank))
            shown.append(
                {
                    str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": self._tokens.text(token)}
                    for token, (logprob, rank) in alternatives.items()
                }
            )
        return shown


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: the byte that each letter stands for. Printable ones are themselves, the others follow U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
