"""Which documents, chats or pairs a step trained on: the order of the data is a function of the frozen config."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.config.frozen import FrozenRun
from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer
from llmtrain.data.chats import ChatRows
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import TokenShards
from llmtrain.data.tokenizer import decode_text, load_tokenizer
from llmtrain.data.votes import votes
from llmtrain.models.packed import Tree, pair
from llmtrain.training.batches import AnswerLogProbs, ChatSteps, PairSteps, TextSteps
from llmtrain.training.resolve import Inputs

EXCERPT_CHARACTERS = 100

AnySteps = TextSteps | ChatSteps | PairSteps


@dataclass(frozen=True)
class Member:
    """A document's part of a row, a chat, or a pair."""

    name: str
    """The document's name, or file:line."""
    text: str
    """Its beginning."""


def steps_of(frozen: FrozenRun, inputs: Inputs, outputs: Path, infra: Infra) -> AnySteps:
    """The steps of a run, without the reference that a preference loss needs besides."""
    match frozen.config.trainer:
        case PretrainTrainer() as trainer:
            shards = TokenShards(outputs / inputs.text.path, "train")
            return TextSteps(shards, trainer, trainer.budget_tokens, trainer.packing, infra)
        case DistillTrainer() as trainer:
            shards = TokenShards(outputs / inputs.text.path, "train")
            return TextSteps(shards, trainer, trainer.budget_tokens, "stream", infra)
        case SFTTrainer() as trainer:
            assert inputs.chats is not None
            return ChatSteps(ChatRows(outputs / inputs.chats.path, "train"), trainer, infra)
        case DPOTrainer() as trainer:
            assert inputs.pairs is not None
            directory = outputs / inputs.pairs.path
            if trainer.loss != "kto":
                return PairSteps(PreferencePairs(directory, "train"), None, trainer, infra)
            found = votes(directory, "train", trainer.sequence_tokens)
            nothing = torch.zeros(len(found))
            return PairSteps(found, AnswerLogProbs(nothing, nothing), trainer, infra)


class Names:
    """What the rows of a run's data are called."""

    def __init__(self, steps: AnySteps, inputs: Inputs, outputs: Path) -> None:
        self.steps = steps
        self.tokenizer: Any = load_tokenizer(inputs.tokenizer_directory)
        listing = (outputs / inputs.text.path / "documents.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in listing]
        self.documents: list[str] = [document["name"] for document in documents if document["split"] == "train"]

    def trees(self, index: int) -> list[Tree]:
        """What stands in row `index`, or in the place of pair `index`, one after the other."""
        if not isinstance(self.steps, PairSteps):
            return self.steps.row(index)
        member = self.steps.pairs[index]
        if self.steps.trainer.loss == "kto":
            return [pair(member.prompt_ids, member.chosen_ids)]
        return [pair(member.prompt_ids, member.chosen_ids, member.rejected_ids)]

    def members(self, index: int) -> list[Member]:
        """All that row `index`, or pair `index`, holds."""
        match self.steps:
            case TextSteps():
                spans = spans_of(self.steps, index)
                return [self.document(number) for start, stop in spans for number in self.documents_in(start, stop)]
            case ChatSteps():
                return [self.chat(number) for number in self.steps.rows[index]]
            case PairSteps():
                return [self.pair(index)]

    def documents_in(self, start: int, stop: int) -> list[int]:
        """The numbers of the documents that tokens `start` to `stop` of the stream belong to."""
        assert isinstance(self.steps, TextSteps)
        first, last = np.searchsorted(self.steps.shards.offsets, [start, stop - 1], side="right") - 1
        return list(range(int(first), int(last) + 1))

    def document(self, number: int) -> Member:
        assert isinstance(self.steps, TextSteps)
        return Member(self.documents[number], self._excerpt(self.steps.shards.document(number).tolist()))

    def chat(self, number: int) -> Member:
        assert isinstance(self.steps, ChatSteps)
        chat = self.steps.chats.text(number)
        return Member(chat.where, shortened(chat.text))

    def pair(self, index: int) -> Member:
        assert isinstance(self.steps, PairSteps)
        found = self.steps.pairs.text(index)
        return Member(found.where, shortened(f"{found.prompt} [chosen] {found.chosen} [rejected] {found.rejected}"))

    def at(self, indices: tuple[int, ...], token: int) -> tuple[list[Member], str] | None:
        """(what holds place `token` of a micro-batch of these rows, the token's text); None where it is padding."""
        for index in indices:
            for place, tree in enumerate(self.trees(index)):
                if token < tree.num_tokens:
                    ids = np.concatenate([tree.prompt, *(answer.ids[:-1] for answer in tree.answers)])
                    return self._holders(index, place, token), self._excerpt([int(ids[token])])
                token -= tree.num_tokens
        return None

    def _holders(self, index: int, place: int, token: int) -> list[Member]:
        """What holds token `token` of the tree that stands at `place` in row `index`."""
        match self.steps:
            case TextSteps():
                start, _ = spans_of(self.steps, index)[place]
                return [self.document(number) for number in self.documents_in(start + token, start + token + 1)]
            case ChatSteps():
                return [self.chat(self.steps.rows[index][place])]
            case PairSteps():
                return [self.pair(index)]

    def _excerpt(self, ids: list[int]) -> str:
        return shortened(decode_text(self.tokenizer, ids[:EXCERPT_CHARACTERS]))


def spans_of(steps: TextSteps, index: int) -> list[tuple[int, int]]:
    """Where the documents of a row, or the row of a stream, start and stop in the stream of tokens."""
    if steps.rows is not None:
        return steps.rows[index]
    size = steps.trainer.sequence_tokens
    return [(index * size, (index + 1) * size + 1)]


def shortened(text: str) -> str:
    """On one line, as long as an excerpt may be."""
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT_CHARACTERS else line[: EXCERPT_CHARACTERS - 3] + "..."
