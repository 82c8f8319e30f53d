"""`data.pairs` from the user's files: pairs, and votes on single answers."""

import json
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from llmtrain.config.data import PreferenceFile, VoteFile
from llmtrain.data.input_files import JsonLine, Refused, fault_of, matching_files, read_json_lines
from llmtrain.data.messages import BadMessage, Message, first_prompt, plain_messages, tools_of
from llmtrain.data.preferences import PairText

FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class ChatPair:
    """As `PairText`, of chat messages."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    where: str


@dataclass(frozen=True)
class Vote:
    """An answer that somebody found good or bad. `pair` has it on both sides."""

    pair: PairText | ChatPair
    is_desirable: bool


def read_pairs(pairs: PreferenceFile) -> tuple[list[PairText | ChatPair], list[Refused], int]:
    """The pairs of the files in order, the refused records, and the number of duplicates left out.

    Refused: malformed lines, missing fields, texts that are empty or no strings, answers that are equal but for white
    space (ties) or that both repeat the prompt, and pairs that other lines contradict by preferring the other answer;
    messages where the template is `plain`, that no chat template could render, or that do not answer a question.
    Raises DataError for a missing file, a glob without a match, or a file that is not UTF-8.
    """
    records = [_pair(line, pairs.template) for path in matching_files(pairs.paths) for line in read_json_lines(path)]
    refused = [record for record in records if isinstance(record, Refused)]
    first_place: dict[tuple[Hashable, ...], str] = {}
    for record in records:
        if not isinstance(record, Refused):
            first_place.setdefault(_content(record), record.where)
    kept: list[PairText | ChatPair] = []
    num_duplicates = 0
    for record in records:
        if isinstance(record, Refused):
            continue
        prompt, chosen, rejected = _content(record)
        opposite = first_place.get((prompt, rejected, chosen))
        if opposite:
            refused.append(Refused(record.where, f"prefers what {opposite} rejects, for the same prompt"))
        elif first_place[prompt, chosen, rejected] == record.where:
            kept.append(record)
        else:
            num_duplicates += 1
    return kept, refused, num_duplicates


def read_votes(votes: VoteFile) -> tuple[list[Vote], list[Refused], int]:
    """The votes of the files in order, the refused records, and the number of duplicates left out.

    Refused: as by `read_pairs`, a `label` that is not true or false, and votes that other lines contradict.
    """
    records = [_vote(line, votes.template) for path in matching_files(votes.paths) for line in read_json_lines(path)]
    refused = [record for record in records if isinstance(record, Refused)]
    first_place: dict[tuple[Hashable, ...], str] = {}
    for record in records:
        if not isinstance(record, Refused):
            first_place.setdefault((*_content(record.pair), record.is_desirable), record.pair.where)
    kept: list[Vote] = []
    num_duplicates = 0
    for record in records:
        if isinstance(record, Refused):
            continue
        content = _content(record.pair)
        if opposite := first_place.get((*content, not record.is_desirable)):
            refused.append(Refused(record.pair.where, f"is voted the other way by {opposite}"))
        elif first_place[*content, record.is_desirable] == record.pair.where:
            kept.append(record)
        else:
            num_duplicates += 1
    return kept, refused, num_duplicates


def prompt_of(pair: PairText | ChatPair) -> str:
    """What decides the split: the prompt, or the first user's message."""
    return pair.prompt if isinstance(pair, PairText) else first_prompt(pair.prompt)


def _pair(line: JsonLine | Refused, template: str) -> PairText | ChatPair | Refused:
    if isinstance(line, Refused):
        return line
    if template == "chat" and any(isinstance(line.fields.get(name), list | dict) for name in FIELDS):
        return _chat_pair(line)
    if isinstance(fault := _fault(line, FIELDS), Refused):
        return fault
    prompt, chosen, rejected = (line.fields[name] for name in FIELDS)
    if chosen.strip() == rejected.strip():
        return Refused(line.where, "is a tie: 'chosen' and 'rejected' are the same text")
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return Refused(line.where, "is a whole dialogue, stored twice: both answers begin with the prompt; cut it off")
    return PairText(prompt, chosen, rejected, line.where)


def _vote(line: JsonLine | Refused, template: str) -> Vote | Refused:
    if isinstance(line, Refused):
        return line
    label = line.fields.get("label")
    if not isinstance(label, bool):
        return Refused(line.where, f"has the label {json.dumps(label)}; it must be true or false")
    if template == "chat" and isinstance(line.fields.get("prompt"), list):
        try:
            prompt, answer = _prompt(line.fields["prompt"]), _answer(line.fields.get("completion"), "completion")
            pair = ChatPair(prompt, answer, answer, tools_of(line.fields.get("tools")), line.where)
        except BadMessage as fault:
            return Refused(line.where, str(fault))
        return Vote(pair, label)
    if isinstance(refusal := _fault(line, ("prompt", "completion")), Refused):
        return refusal
    answer_text = line.fields["completion"]
    return Vote(PairText(line.fields["prompt"], answer_text, answer_text, line.where), label)


def _fault(line: JsonLine, names: tuple[str, ...]) -> Refused | None:
    for name in names:
        if name not in line.fields:
            return Refused(line.where, f"has no field '{name}'")
        if fault := fault_of(line.fields[name]):
            is_list = isinstance(line.fields[name], list) and name == "prompt"
            remedy = "; messages need data.pairs.template=chat" if is_list else ""
            return Refused(line.where, f"'{name}' {fault}{remedy}")
    return None


def _chat_pair(line: JsonLine) -> ChatPair | Refused:
    fields = line.fields
    try:
        asked = fields.get("conversations", fields.get("prompt"))
        if isinstance(asked, list):
            prompt = _prompt(asked)
            chosen, rejected = (_answer(fields.get(name), name) for name in FIELDS[1:])
        else:  # two whole conversations: what they begin with is the prompt, whatever text stands in that field
            whole = [plain_messages(fields.get(name), name) for name in FIELDS[1:]]
            shared = 0
            while shared < min(map(len, whole)) and whole[0][shared] == whole[1][shared]:
                shared += 1
            prompt = _prompt(list(whole[0][:shared]))
            chosen, rejected = (_answer(list(one[shared:]), name) for one, name in zip(whole, FIELDS[1:], strict=True))
        if chosen == rejected:
            raise BadMessage("is a tie: 'chosen' and 'rejected' are the same messages")
        return ChatPair(prompt, chosen, rejected, tools_of(fields.get("tools")), line.where)
    except BadMessage as fault:
        return Refused(line.where, str(fault))


def _prompt(value: Any) -> tuple[Message, ...]:
    if not value:
        raise BadMessage("there is no prompt: it is empty, or 'chosen' and 'rejected' begin with different messages")
    messages = plain_messages(value, "prompt")
    first = next((message["role"] for message in messages if message["role"] != "system"), "nobody")
    if first != "user":
        raise BadMessage(f"the prompt begins with {first}: there is no question")
    if messages[-1]["role"] not in ("user", "tool"):
        raise BadMessage(f"the prompt ends with {messages[-1]['role']}: there is nothing to answer")
    return messages


def _answer(value: Any, name: str) -> tuple[Message, ...]:
    """One message of the assistant, alone or in a list: whatever stands in an answer is held for or against it."""
    messages = plain_messages([value] if isinstance(value, dict) else value, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadMessage(f"'{name}' is not one message of the assistant")
    return messages


def _content(pair: PairText | ChatPair) -> tuple[Hashable, Hashable, Hashable]:
    if isinstance(pair, PairText):
        return pair.prompt, pair.chosen, pair.rejected
    prompt, chosen, rejected = (
        json.dumps(part, sort_keys=True) for part in ((pair.prompt, pair.tools), pair.chosen, pair.rejected)
    )
    return prompt, chosen, rejected
