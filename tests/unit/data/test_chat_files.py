"""Chats of the usual forms become one; what cannot be learnt faithfully is refused with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_samples import TOOL, assistant, user

from llmtrain.config.data import ChatFile
from llmtrain.data.chat_files import conversation, read_chats
from llmtrain.data.input_files import JsonLine, Refused, read_json_records
from llmtrain.data.messages import Conversation, shown
from llmtrain.errors import DataError

A_PAIR = (user("q"), assistant("a"))


def parsed(fields: dict[str, Any], form: Any = "auto") -> Conversation:
    found = conversation(JsonLine("f:1", fields), form)
    assert isinstance(found, Conversation), found
    return found


def reason(fields: dict[str, Any], form: Any = "auto") -> str:
    found = conversation(JsonLine("f:1", fields), form)
    assert isinstance(found, Refused), found
    assert found.where == "f:1"
    return found.reason


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": list(A_PAIR)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {**A_PAIR[1], "extra": 1}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
        {"conversations": list(A_PAIR), "tools": None},
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"instruction": "q", "input": "", "output": "a"},
        {"question": "q", "answer": "a"},
    ],
)
def test_each_form_becomes_the_same_conversation(fields: dict[str, Any]) -> None:
    assert parsed(fields) == Conversation(A_PAIR, (True,), None, "f:1")


def test_an_input_stands_below_its_instruction() -> None:
    assert parsed({"instruction": "Sort.", "input": "b a", "output": "a b"}).first_prompt == "Sort.\n\nb a"


def test_only_the_completion_of_message_pairs_is_learnt() -> None:
    fields = {"prompt": [user("q"), assistant("a"), user("r")], "completion": [assistant("b")]}
    assert parsed(fields).is_learnt == (False, True)


def test_calls_and_observations_of_sharegpt() -> None:
    found = parsed(
        {
            "conversations": [
                {"from": "human", "value": "Rain in Bonn?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Bonn"}}'},
                {"from": "observation", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ],
            "system": "Be short.",
            "tools": json.dumps([TOOL["function"]]),
        }
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
    assert found.messages == (
        {"role": "system", "content": "Be short."},
        user("Rain in Bonn?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "dry"},
        assistant("No."),
    )
    assert found.is_learnt == (True, True)
    assert found.tools == (TOOL,)
    assert shown(found.messages[2:3]) == '{"name": "weather", "arguments": {"town": "Bonn"}}'


def test_arguments_as_json_become_an_object() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    found = parsed({"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}]


BAD = {
    "is no chat: it has neither 'messages' nor 'conversations' nor a question and its answer; its fields: text": {
        "text": "x"
    },
    "'messages' is no list of messages": {"messages": []},
    "message 2 of 'messages' is no object": {"messages": [user("q"), "a"]},
    "message 1 of 'messages' has the role \"critic\"; it may be system, user, assistant, tool, ": {
        "messages": [{"role": "critic", "content": "q"}]
    },
    "message 2 of 'messages' is empty": {"messages": [user("q"), assistant(" ")]},
    "message 1 of 'prompt' is empty": {"prompt": "", "response": "a"},
    "the content of message 1 of 'question' is no text": {"question": 3, "answer": "4"},
    "the content of message 1 of 'messages' is no text": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant("a")]
    },
    "message 1 of 'messages' has a NUL character": {"messages": [user("a\0"), assistant("a")]},
    "message 2 of 'messages' has the weight 0.5; it may be 0 or 1": {
        "messages": [user("q"), assistant("a", weight=0.5)]
    },
    "begins with assistant: there is no question": {"messages": [assistant("Hi"), user("q"), assistant("a")]},
    "ends with user: nothing is learnt from what is not answered": {"messages": [*A_PAIR, user("thanks")]},
    "gives every message of the assistant a weight of 0": {"messages": [user("q"), assistant("a", weight=0)]},
    "message 2 of 'messages' calls a function without a name": {
        "messages": [user("q"), assistant("", tool_calls=[{}])]
    },
    "message 2 of 'messages': the arguments of f are no object": {
        "messages": [user("q"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]
    },
    "message 2 of 'conversations': malformed JSON": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]
    },
    "tool 1 has no name": {"messages": list(A_PAIR), "tools": [{"type": "function", "function": {}}]},
    "'tools': malformed JSON": {"messages": list(A_PAIR), "tools": "[{"},
}


@pytest.mark.parametrize("wanted", BAD)
def test_what_cannot_be_rendered_faithfully_is_refused(wanted: str) -> None:
    assert reason(BAD[wanted]).startswith(wanted)


def test_a_form_that_is_named_must_be_there() -> None:
    assert reason({"question": "q", "answer": "a"}, "messages") == "'messages' is no list of messages"
    assert reason({"messages": list(A_PAIR)}, "pairs").startswith("has no question with its answer: 'prompt' and")


def test_duplicates_are_dropped_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [{"question": "q", "answer": "a"}, {"messages": list(A_PAIR)}, {"question": "q", "answer": "b"}, {"x": 1}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    kept, refused, num_duplicates = read_chats(ChatFile(kind="jsonl", paths=(str(path),), licence="MIT", format="auto"))
    assert [each.where for each in kept] == [f"{path}:1", f"{path}:3"]
    assert [each.where for each in refused] == [f"{path}:4", f"{path}:5"]
    assert num_duplicates == 1


def test_an_array_is_read_like_lines_and_each_object_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text('\ufeff[\n  {"a": 1},\n  {\n    "b": "]"\n  }, 3,\n\n{"c": []}]\n')
    assert list(read_json_records(path)) == [
        JsonLine(f"{path}:2", {"a": 1}),
        JsonLine(f"{path}:3", {"b": "]"}),
        Refused(f"{path}:5", "is a number, not an object"),
        JsonLine(f"{path}:7", {"c": []}),
    ]
    path.write_text("[]")
    assert list(read_json_records(path)) == []
    path.write_text('{"a": 1}\n[1]\n')
    assert [type(record) for record in read_json_records(path)] == [JsonLine, Refused]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"a": 1},\n {"b": }]', r"json:2: malformed JSON in the array"),
        ('[{"a": 1}\n {"b": 2}]', r"json:1: no comma after this object"),
        ('[{"a": 1},\n{"b": 2}', r"json:2: no comma after this object"),
        ('[{"a": 1}]\n[{"a": 2}]', r"json:1: text after the end of the array; write one array, or one object a line"),
    ],
)
def test_a_broken_array_is_an_error_with_its_line(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "chats.json"
    path.write_text(text)
    with pytest.raises(DataError, match=wanted):
        list(read_json_records(path))
