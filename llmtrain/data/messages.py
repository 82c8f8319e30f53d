"""Chat messages as people store them, in one form: OpenAI's, as chat templates read it.

{"role": "system" | "user" | "tool", "content": str}
{"role": "assistant", "content": str, "reasoning_content": str, "tool_calls": [{"type": "function", "function": {...}}]}
"""

import json
from dataclasses import dataclass
from typing import Any

from llmtrain.data.input_files import fault_of

Message = dict[str, Any]

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of the roles in OpenAI's messages and in ShareGPT's, and what they are called here."""


class BadMessage(ValueError):
    """Says what is wrong with a record; its reader adds file and line."""


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template can render, and which of the assistant's are learnt."""

    messages: tuple[Message, ...]
    is_learnt: tuple[bool, ...]
    """[assistant messages]: false where the record gives the message a `weight` of 0."""
    tools: tuple[dict[str, Any], ...] | None
    """JSON schemas of the functions that the assistant may call, as OpenAI wraps them."""
    where: str
    """file:line"""

    @property
    def first_prompt(self) -> str:
        """The first user's message: what decides the split."""
        return first_prompt(self.messages)


def first_prompt(messages: tuple[Message, ...]) -> str:
    """The content of the first user's message."""
    return str(next(message["content"] for message in messages if message["role"] == "user"))


def weighted_messages(value: Any, name: str, *, may_be_empty: bool = False) -> list[tuple[Message, bool]]:
    """The messages of the field `name`, and whether each is learnt where it is the assistant's.

    Takes OpenAI's {"role", "content"} and ShareGPT's {"from", "value"}. Raises BadMessage for whatever a template would
    drop or misunderstand: other roles, contents that are no text, calls without a name; and for a message without
    content unless it `may_be_empty`, as in a conversation that goes on.
    """
    if not isinstance(value, list) or not value:
        raise BadMessage(f"'{name}' is no list of messages")
    return [_message(item, f"message {number} of '{name}'", may_be_empty) for number, item in enumerate(value, start=1)]


def plain_messages(value: Any, name: str, *, may_be_empty: bool = False) -> tuple[Message, ...]:
    """As `weighted_messages`, without the weights."""
    return tuple(message for message, _ in weighted_messages(value, name, may_be_empty=may_be_empty))


def tools_of(value: Any) -> tuple[dict[str, Any], ...] | None:
    """A record's `tools`: a list or its JSON, None where there are none. A bare function is wrapped as OpenAI does."""
    tools = _parsed(value, "'tools'") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadMessage("'tools' is no list")
    wrapped = [
        tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
    for number, tool in enumerate(wrapped, start=1):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise BadMessage(f"tool {number} has no name")
    return tuple(wrapped)


def texts_in(value: Any) -> str:
    """All strings in messages or tools, keys included, one a line: to be searched."""
    match value:
        case str():
            return value
        case dict():
            return "\n".join(f"{key}\n{texts_in(inner)}" for key, inner in value.items())
        case list() | tuple():
            return "\n".join(map(texts_in, value))
        case _:
            return ""


def shown(messages: tuple[Message, ...]) -> str:
    """What the messages say, for people: contents, and calls as JSON."""
    parts: list[str] = []
    for message in messages:
        parts += [text for text in (message.get("reasoning_content"), message["content"]) if text]
        parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(parts)


def _message(item: Any, place: str, may_be_empty: bool) -> tuple[Message, bool]:
    if not isinstance(item, dict):
        raise BadMessage(f"{place} is no object")
    name, content = (item.get("role"), item.get("content")) if "role" in item else (item.get("from"), item.get("value"))
    if not isinstance(name, str) or name not in ROLES:
        raise BadMessage(f"{place} has the role {json.dumps(name)}; it may be {', '.join(ROLES)}")
    role = ROLES[name]
    message: Message = {"role": role, "content": _text(content, place)}
    if role == "assistant":
        if name == "function_call":
            calls = _parsed(message["content"], place)
            message = {"role": role, "content": "", "tool_calls": _calls(calls, place)}
        elif item.get("tool_calls"):
            message["tool_calls"] = _calls(item["tool_calls"], place)
        if reasoning := item.get("reasoning_content"):
            message["reasoning_content"] = _text(reasoning, place)
    message |= {key: item[key] for key in ("name", "tool_call_id") if isinstance(item.get(key), str)}
    needs_content = role in ("system", "user") or (role == "assistant" and len(message) == 2)
    fault = fault_of(texts_in(message))
    if needs_content and not may_be_empty and not message["content"].strip():
        fault = "is empty"
    if fault:
        raise BadMessage(f"{place} {fault}")
    weight = item.get("weight", 1)
    if weight not in (0, 1):
        raise BadMessage(f"{place} has the weight {json.dumps(weight)}; it may be 0 or 1")
    return message, bool(weight)


def _text(content: Any, place: str) -> str:
    """A string, nothing, or a list of text parts."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            if len(texts) == len(content):
                return "".join(texts)
    raise BadMessage(f"the content of {place} is no text")


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """OpenAI's form, arguments as an object; also of bare {"name", "arguments"}, one or a list."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadMessage(f"{place} calls a function without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"{place}: the arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise BadMessage(f"{place}: the arguments of {function['name']} are no object")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"{place}: malformed JSON ({error})") from error
