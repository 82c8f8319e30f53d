"""Chats made of the standard library's docstrings: what a function does, and how it is called."""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from llmtrain.data import python_docs
from llmtrain.data.messages import Conversation, first_prompt

FEWEST_WORDS = 4
"""A shorter first paragraph says too little to be an answer."""


def chats(max_answer_characters: int) -> Iterator[tuple[str, Conversation]]:
    """The chats in the order of the library, each with the name of its module.

    One for each public function or method whose docstring begins with a paragraph of at most `max_answer_characters`:
    what it does, and in a second turn its call. A text that answers several questions answers the first.
    """
    answers = set[str]()
    for module, tree in python_docs.module_trees():
        for node, name, docstring in python_docs.documented(tree, module):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_private(name):
                continue
            answer = first_paragraph(docstring)
            if len(answer) <= max_answer_characters and len(answer.split()) >= FEWEST_WORDS and answer not in answers:
                answers.add(answer)
                yield module, _conversation(name, answer, python_docs.call(node, name.rpartition(".")[2]))


def splits_of_modules(text_dir: Path) -> dict[str, str]:
    """The split of each module's docstrings, where prepared text has them as documents: what is held out of the text is
    held out of the chats.
    """
    with (text_dir / "documents.jsonl").open() as listing:
        return {facts["name"]: facts["split"] for facts in map(json.loads, listing)}


def sample(chats: list[Conversation], most: int, seed: int) -> list[Conversation]:
    """`most` of the chats, chosen by hash, in their order."""

    def rank(chat: Conversation) -> bytes:
        return hashlib.sha256(f"{seed} {first_prompt(chat.messages)}".encode()).digest()

    kept = set(map(rank, sorted(chats, key=rank)[:most]))
    return [chat for chat in chats if rank(chat) in kept]


def first_paragraph(docstring: str) -> str:
    """The first paragraph on one line."""
    return " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


def _is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def _conversation(name: str, answer: str, call: str) -> Conversation:
    turns = (
        ("user", f"What does `{name}` do?"),
        ("assistant", answer),
        ("user", "How is it called?"),
        ("assistant", f"`{call}`"),
    )
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(messages, is_learnt=(True, True), tools=None, where=name)
