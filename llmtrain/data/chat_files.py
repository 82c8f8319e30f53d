"""`data.chats` from the user's files."""

import json
from typing import Any, Literal

from llmtrain.config.data import ChatFile
from llmtrain.data.input_files import JsonLine, Refused, matching_files, read_json_records
from llmtrain.data.messages import BadMessage, Conversation, Message, tools_of, weighted_messages

Form = Literal["messages", "sharegpt", "pairs"]

PAIR_FIELDS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
"""Names of question and answer in the plain forms."""


def read_chats(chats: ChatFile) -> tuple[list[Conversation], list[Refused], int]:
    """The chats of the files in order, the refused records, and the number of duplicates left out.

    Refused: malformed records, messages that no template could render faithfully, chats that do not begin with the
    user (after a system message), that do not end with the assistant, or in which nothing is learnt. Raises DataError
    as `read_json_records` does.
    """
    kept: list[Conversation] = []
    refused: list[Refused] = []
    seen = set[str]()
    num_duplicates = 0
    for path in matching_files(chats.paths):
        for line in read_json_records(path):
            record = line if isinstance(line, Refused) else conversation(line, chats.format)
            if isinstance(record, Refused):
                refused.append(record)
                continue
            content = json.dumps([record.messages, record.is_learnt, record.tools], sort_keys=True)
            num_duplicates += content in seen
            if content not in seen:
                seen.add(content)
                kept.append(record)
    return kept, refused, num_duplicates


def conversation(line: JsonLine, form: Form | Literal["auto"]) -> Conversation | Refused:
    """A record as a conversation that begins with the user and ends with the assistant, or why it is none."""
    try:
        weighted = _weighted(line.fields, _form(line.fields) if form == "auto" else form)
        messages = tuple(message for message, _ in weighted)
        is_learnt = tuple(learnt for message, learnt in weighted if message["role"] == "assistant")
        first = next((message["role"] for message in messages if message["role"] != "system"), "nobody")
        if first != "user":
            raise BadMessage(f"begins with {first}: there is no question that the assistant answers")
        if messages[-1]["role"] != "assistant":
            raise BadMessage(f"ends with {messages[-1]['role']}: nothing is learnt from what is not answered")
        if not any(is_learnt):
            raise BadMessage("gives every message of the assistant a weight of 0")
        return Conversation(messages, is_learnt, tools_of(line.fields.get("tools")), line.where)
    except BadMessage as fault:
        return Refused(line.where, str(fault))


def _form(fields: dict[str, Any]) -> Form:
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "sharegpt"
    if any(question in fields and answer in fields for question, answer in PAIR_FIELDS):
        return "pairs"
    has = ", ".join(sorted(fields)) or "none"
    raise BadMessage(
        f"is no chat: it has neither 'messages' nor 'conversations' nor a question and its answer; its fields: {has}"
    )


def _weighted(fields: dict[str, Any], form: Form) -> list[tuple[Message, bool]]:
    match form:
        case "messages":
            return weighted_messages(fields.get("messages"), "messages")
        case "sharegpt":
            found = weighted_messages(fields.get("conversations"), "conversations")
        case "pairs":
            found = _pair(fields)
    if system := fields.get("system"):
        return weighted_messages([{"role": "system", "content": system}], "system") + found
    return found


def _pair(fields: dict[str, Any]) -> list[tuple[Message, bool]]:
    for question, answer in PAIR_FIELDS:
        if question in fields and answer in fields:
            asked, answered = fields[question], fields[answer]
            if isinstance(asked, list):  # messages, of which the answer's are learnt
                before = [(message, False) for message, _ in weighted_messages(asked, question)]
                return before + weighted_messages(answered, answer)
            if question == "instruction" and fields.get("input"):
                asked = f"{asked}\n\n{fields['input']}"
            return weighted_messages([{"role": "user", "content": asked}], question) + weighted_messages(
                [{"role": "assistant", "content": answered}], answer
            )
    names = ", ".join(f"'{question}' and '{answer}'" for question, answer in PAIR_FIELDS)
    raise BadMessage(f"has no question with its answer: {names}")
