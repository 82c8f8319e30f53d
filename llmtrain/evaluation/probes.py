"""256 pinned probes, made of `probes.toml`: what every form of a model, on every engine, is asked by the parity gate.

    chat     80   one to four turns, with and without a system's; a quarter ends with an answer, which is scored too
    code     64   sixteen languages and formats, names and numbers changed
    unicode  56   emoji, combining marks, right to left, CJK, zero width, white space; half of them in a chat
    tools    40   the question, the call, its result, two calls at once
    long     16   text of 1, 1/2, 1/4 and 1/8 of the context: of eight, one, one, two and four

They are scored as the trained model reads them: its tokenizer, its chat template. Nothing of them depends on a random
generator or on the machine.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from llmtrain.config.base import content_hash
from llmtrain.data.chat_template import ChatTemplate
from llmtrain.data.messages import BadMessage, Message, plain_messages
from llmtrain.data.tokenizer import encode_rendered_chats, encode_texts
from llmtrain.errors import UserError

Kind = Literal["chat", "code", "unicode", "tools", "long"]
NUMBER_OF: dict[Kind, int] = {"chat": 80, "code": 64, "unicode": 56, "tools": 40, "long": 16}
NUMBER = sum(NUMBER_OF.values())
SHARES = (1.0, 1 / 8, 1 / 4, 1 / 8, 1 / 2, 1 / 8, 1 / 4, 1 / 8)
"""Of the context, that a long text fills."""


@dataclass(frozen=True)
class Probe:
    """A text, or messages and tools, or a share of the context to be filled with text number `seed`."""

    kind: Kind
    number: int
    """Within its kind."""
    text: str | None = None
    messages: tuple[Message, ...] = ()
    """As clients of OpenAI's protocol send them: a call's arguments are JSON text there."""
    tools: tuple[Mapping[str, Any], ...] = ()
    share_of_context: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:02d}"

    @property
    def asks(self) -> bool:
        """Does the model have the next turn?"""
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"


@dataclass(frozen=True)
class Row:
    """A probe as the trained model reads it."""

    probe: Probe
    text: str | None
    """None of messages."""
    ids: tuple[int, ...]
    """All of it, also what the context has no room for."""
    scored: tuple[int, ...]
    """What fits into the context with one token more, which an engine writes when it is asked for scores."""


@dataclass(frozen=True)
class Rows:
    """The probes that a model can be asked, and how many it cannot, by the reason."""

    rows: tuple[Row, ...]
    context_tokens: int
    skipped: Mapping[str, int] = field(default_factory=dict)


def probes(number: int = NUMBER) -> tuple[Probe, ...]:
    """The first `number` of them, 1 to 256: any number holds the kinds in their shares, as near as may be.

    Raises UserError for another number.
    """
    if not 1 <= number <= NUMBER:
        raise UserError(f"there are {NUMBER} probes; ask for 1 to {NUMBER}, not {number}")
    places = [
        ((index + 0.5) / count, place, index)
        for place, count in enumerate(NUMBER_OF.values())
        for index in range(count)
    ]
    kinds = list(NUMBER_OF)
    return tuple(_MAKE[kinds[place]](index) for _, place, index in sorted(places)[:number])


def probes_sha256() -> str:
    """Hash of all probes and of 100 sentences of each long text."""
    parts = [vars(probe) for probe in probes()]
    return content_hash([parts, [list(islice(sentences(seed), 100)) for seed in range(NUMBER_OF["long"])]])


def rows(tokenizer: Any, context_tokens: int, number: int = NUMBER) -> Rows:
    """The first `number` probes as a model with this tokenizer reads them in a context of `context_tokens`.

    Left out, and counted, are chats where there is no chat template, tools where it does not show them, and what it
    refuses, such as a system's turn.
    """
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    found, skipped = [], Counter[str]()
    for probe in probes(number):
        text = probe.text
        if probe.share_of_context is not None:
            text = long_text(tokenizer, int(probe.share_of_context * (context_tokens - 1)), probe.number)
        if text is not None:
            (ids,) = encode_texts(tokenizer, [text])
        elif template is None:
            skipped["the tokenizer has no chat template"] += 1
            continue
        elif probe.kind == "tools" and not (template.shows_tools and template.shows_calls):
            skipped["the chat template does not show tools"] += 1
            continue
        else:
            try:
                plain = plain_messages(list(probe.messages), probe.name)  # as training reads a file of chats
                rendered = template.text(plain, probe.tools, add_generation_prompt=probe.asks)
            except BadMessage as error:
                skipped[str(error)] += 1
                continue
            (ids,) = encode_rendered_chats(tokenizer, [rendered])
        if len(ids) < 2:
            skipped["nothing is left to predict"] += 1
            continue
        found.append(Row(probe, text, tuple(ids), tuple(ids[: context_tokens - 1])))
    return Rows(tuple(found), context_tokens, dict(skipped))


def long_text(tokenizer: Any, num_tokens: int, seed: int) -> str:
    """As many whole sentences as fit into `num_tokens`, one at least, and a question about the first."""
    question: str = _parts()["long"]["question"]
    source, chosen = sentences(seed), [""]
    room = num_tokens - len(encode_texts(tokenizer, [question])[0])
    while room > 0:
        chosen.append(next(source))
        room -= len(encode_texts(tokenizer, [chosen[-1]])[0])
    text = "".join(chosen).strip()
    while len(encode_texts(tokenizer, [text + question])[0]) > num_tokens and len(chosen) > 2:
        chosen.pop()
        text = "".join(chosen).strip()
    return text + question


def sentences(seed: int) -> Iterator[str]:
    """Sentences without end; every seed gives others, and none comes twice."""
    parts = _parts()["long"]
    day, state = 0, seed
    while True:
        day += 1
        words = {"day": str(day)}
        for name in ("who", "town", "did", "number", "things", "end"):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX generator
            draw = state >> 33
            words[name] = str(draw % 10_000) if name == "number" else parts[name][draw % len(parts[name])]
        sentence: str = parts["sentence"]
        for name, word in words.items():
            sentence = sentence.replace(f"@{name}@", word)
        yield " " + sentence.replace("@day@", str(1 + day // 2))


@cache
def _parts() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("probes.toml").read_text(encoding="utf-8"))


def _grid(number: int, columns: int, rows: int) -> tuple[int, int]:
    """Each pair of a column and a row once, and the first few of different columns and rows."""
    return number % columns, (number + number // columns) % rows


def _chat(number: int) -> Probe:
    parts = _parts()
    topic, shape = _grid(number, len(parts["chats"]), 4)
    turns = list(zip(("user", "assistant") * 2, parts["chats"][topic], strict=True))
    system = [("system", parts["systems"][number % len(parts["systems"])])] if shape % 2 else []
    spoken = system + turns[: (1, 1, 3, 4)[shape]]
    return Probe("chat", number, messages=tuple({"role": role, "content": text} for role, text in spoken))


def _code(number: int) -> Probe:
    parts = _parts()
    snippet, names = _grid(number, len(parts["codes"]), len(parts["names"]))
    text = parts["codes"][snippet].replace("@name@", parts["names"][names])
    return Probe("code", number, text.replace("@number@", parts["numbers"][names]))


def _unicode(number: int) -> Probe:
    parts = _parts()
    line, in_a_chat = _grid(number, len(parts["unicode"]), 2)
    text = parts["unicode"][line]
    if in_a_chat:
        return Probe("unicode", number, messages=({"role": "user", "content": parts["repeat"] + text},))
    return Probe("unicode", number, text)


def _tools(number: int) -> Probe:
    every = _parts()["tools"]
    which, stage = _grid(number, len(every), 4)
    tool, other = every[which], every[(which + 3) % len(every)]
    used = [tool, other] if stage == 3 else [tool]
    messages: list[Message] = [{"role": "user", "content": tool["ask"]}]
    if stage > 0:
        messages.append({"role": "assistant", "content": "", "tool_calls": [_call(one) for one in used]})
    if stage > 1:
        messages += [{"role": "tool", "content": one["result"], "tool_call_id": f"call_{one['name']}"} for one in used]
    if stage > 2:
        messages += [{"role": "assistant", "content": tool["answer"]}, {"role": "user", "content": other["ask"]}]
    return Probe("tools", number, messages=tuple(messages), tools=(_schema(tool), _schema(other)))


def _call(tool: dict[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "arguments": json.dumps(tool["arguments"], ensure_ascii=False)}
    return {"id": f"call_{tool['name']}", "type": "function", "function": function}


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": tool["parameters"], "required": list(tool["parameters"])[:1]}
    function = {"name": tool["name"], "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def _long(number: int) -> Probe:
    return Probe("long", number, share_of_context=SHARES[number % len(SHARES)])


_MAKE: dict[Kind, Callable[[int], Probe]] = {
    "chat": _chat, "code": _code, "unicode": _unicode, "tools": _tools, "long": _long,
}  # fmt: skip
