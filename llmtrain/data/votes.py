"""Votes on single answers, for KTO (arXiv 2402.01306): as they were cast, or two made of each preference pair."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.data.preferences import Pair, PairText, PreferencePairs
from llmtrain.errors import DataError


def votes(directory: Path, split: str, max_tokens: int) -> PreferencePairs:
    """One split of prepared votes, or of prepared pairs as votes; `PreferencePairs.is_desirable` has the labels."""
    pairs = PreferencePairs(directory, split)
    return PairVotes(directory, split, max_tokens) if pairs.is_desirable(0) is None else pairs


class PairVotes(PreferencePairs):
    """Each pair as two votes: 2i for its chosen answer, 2i + 1 against its rejected one.

    In the place of the rejected answer stands the answer of the same kind to another prompt, cut where prompt and
    answer would have more than `max_tokens`. Raises DataError where all pairs have one prompt.
    """

    def __init__(self, directory: Path, split: str, max_tokens: int) -> None:
        super().__init__(directory, split)
        self.max_tokens = max_tokens
        self._other = answers_to_others([self._pair(i).prompt_ids.tobytes() for i in range(super().__len__())])

    def __reduce__(self) -> tuple[Any, ...]:
        return PairVotes, (self.directory, self.split, self.max_tokens)

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __getitem__(self, index: int) -> Pair:
        """Raises IndexError past the end, so that `for vote in votes` ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"vote {index} of {len(self)}")
        pair, other = self._pair(index // 2), self._pair(self._other[index // 2])
        answers = [(each.rejected_ids if index % 2 else each.chosen_ids) for each in (pair, other)]
        return Pair(pair.prompt_ids, answers[0], answers[1][: self.max_tokens - len(pair.prompt_ids)])

    def num_tokens(self, index: int) -> int:
        vote = self[index]
        return 2 * len(vote.prompt_ids) + len(vote.chosen_ids) + len(vote.rejected_ids)

    def text(self, index: int) -> PairText:
        pair, other = super().text(index // 2), super().text(self._other[index // 2])
        answers = [(each.rejected if index % 2 else each.chosen) for each in (pair, other)]
        return PairText(pair.prompt, answers[0], answers[1], pair.where)

    def is_desirable(self, index: int) -> bool:
        return index % 2 == 0

    def longer_is_chosen_accuracy(self) -> float:
        return PreferencePairs(self.directory, self.split).longer_is_chosen_accuracy()

    def _pair(self, index: int) -> Pair:
        return PreferencePairs.__getitem__(self, index)


def answers_to_others(prompts: Sequence[Hashable]) -> list[int]:
    """For each example the nearest one before it, in a circle, that has another prompt: whose answer does not fit it.

    TRL turns each batch by one (`get_kl_completion_ids`); here the partner does not depend on the batch, so that the
    reference's log-probability of it can be computed once. Raises DataError where all prompts are equal.
    """
    last_other = next((i for i in reversed(range(len(prompts))) if prompts[i] != prompts[0]), None)
    if last_other is None:
        raise DataError("KTO needs answers to at least two prompts in each split; add some")
    others = [last_other]
    for index in range(1, len(prompts)):
        others.append(index - 1 if prompts[index - 1] != prompts[index] else others[-1])
    return others
