"""Conversations and chat templates for the tests of chats."""

from typing import Any

from llmtrain.data.chat_files import conversation
from llmtrain.data.input_files import JsonLine
from llmtrain.data.messages import Conversation

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of SmolLM2-135M-Instruct, as its GGUF has it."""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def called(**arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]


ONE_TURN = [user("What is 2+3?"), assistant("It is 5.")]
TWO_TURNS = [{"role": "system", "content": "Be short."}, user("2+3?"), assistant("5"), user("4+4?"), assistant("8")]
TOOL_TURNS = [
    user("Rain in Bonn, Kiel?"),
    assistant("", tool_calls=called(town="Bonn") + called(town="Kiel")),
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "wet"},
    assistant("Only in Kiel 🌧."),
    user("Thanks!"),
    assistant("Any time."),
]


def chat(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Conversation:
    found = conversation(JsonLine("chats.jsonl:1", {"messages": messages, "tools": tools}), "auto")
    assert isinstance(found, Conversation), found
    return found
