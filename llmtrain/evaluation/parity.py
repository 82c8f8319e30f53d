"""The parity gate: does another form of a model, or an engine, compute what was trained?

Compared are the tokens that texts and chats become, and the log-probability of every token of the probes. In fp32 the
bounds are those of rounding. Less precision has a floor, measured on the same weights and probes: what rounding them
so, in this process, changes. A right engine rounds at the same places and stays near that; a fault comes on top of it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from llmtrain.artifacts import Evidence
from llmtrain.client.client import Scores
from llmtrain.data.tokenizer import decode_text
from llmtrain.errors import NotTheSameModel, RequestRefused
from llmtrain.evaluation.parties import Party
from llmtrain.evaluation.probes import Row, Rows
from llmtrain.evaluation.reference import scores
from llmtrain.evaluation.rounding import Precision, rounded

PROCEDURE = "llmtrain.evaluation.parity"
MEAN_OF_FLOOR, MAX_OF_FLOOR = 1.5, 6.0
"""Times the floor's: right engines had means of 0.5 to 1.05 of it. The largest is one token's, and had up to 3.2."""
CONTEXT_BYTES = 24
"""Shown on either side of the first byte that differs."""


@dataclass(frozen=True)
class Bounds:
    """What a party may differ by: nats, and the share of positions whose likeliest token is the same."""

    mean_nats: float
    max_nats: float
    top1: float


FP32 = Bounds(mean_nats=1e-4, max_nats=1e-3, top1=0.999)
"""Sums in another order differ by 1e-5; two likeliest tokens are seldom that near to each other."""


@dataclass(frozen=True)
class Differences:
    """Of the log-probabilities of two parties on the same tokens."""

    nats: NDArray[np.float64]
    """[tokens] |difference|."""
    top1: float
    """Share of positions whose likeliest token is the same."""
    worst: str
    """The token that differs most, in words."""

    @property
    def mean_nats(self) -> float:
        return float(self.nats.mean())

    @property
    def max_nats(self) -> float:
        return float(self.nats.max())


@dataclass(frozen=True)
class Answers:
    """What a party says to the probes."""

    party: str
    scores: list[Scores]
    num_texts: int
    """Texts and chats whose tokens were compared."""
    unequal: tuple[str, ...]
    """Of those, the ones that differ, in words."""


@dataclass(frozen=True)
class Verdict:
    """What was found about one party."""

    party: str
    precision: Precision
    found: Differences
    bounds: Bounds
    num_texts: int
    unequal: tuple[str, ...]
    rows: Rows

    @property
    def faults(self) -> list[str]:
        """Why it is not the same model; none where it is. What is not a number is a fault."""
        found, bounds = self.found, self.bounds
        faults = [
            f"{name} {value:.3g} nats, allowed {bound:.3g}; worst: {found.worst}"
            for name, value, bound in (
                ("mean |dlogp|", found.mean_nats, bounds.mean_nats),
                ("max |dlogp|", found.max_nats, bounds.max_nats),
            )
            if not value <= bound
        ]
        if not found.top1 >= bounds.top1:
            faults.append(
                f"the likeliest token is the same at {found.top1:.2%} of the places, wanted {bounds.top1:.2%}"
            )
        if self.unequal:
            faults.append(f"{len(self.unequal)} of {self.num_texts} texts become other tokens; {self.unequal[0]}")
        return faults

    def evidence(self, parents: Iterable[str]) -> Evidence:
        """The record of it; `parents` are the hashes of the records that it speaks of."""
        figures = {
            "passed": float(not self.faults),
            "mean_abs_dlogp_nats": self.found.mean_nats,
            "max_abs_dlogp_nats": self.found.max_nats,
            "top1_agreement": self.found.top1,
            "bound_mean_nats": self.bounds.mean_nats,
            "bound_max_nats": self.bounds.max_nats,
            "bound_top1": self.bounds.top1,
            "num_tokens": float(len(self.found.nats)),
            "num_probes": float(len(self.rows.rows)),
            "num_probes_skipped": float(sum(self.rows.skipped.values())),
            "num_texts": float(self.num_texts),
            "num_texts_unequal": float(len(self.unequal)),
        }
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}  # JSON has no others
        return Evidence(parents=tuple(parents), procedure=PROCEDURE, figures=finite)


@dataclass
class Reference:
    """The trained weights in fp32 with the tokenizer of the training, and what they answer to the probes."""

    model: PreTrainedModel
    tokenizer: Any
    rows: Rows
    given: list[Scores] | None = None
    """Answers that others are held against in the place of the weights' own."""
    _bounds: dict[Precision, Bounds] = field(default_factory=lambda: {"fp32": FP32})

    @cached_property
    def scores(self) -> list[Scores]:
        return self.given or scores(self.model, self.ids)

    def bounds(self, precision: Precision) -> Bounds:
        """What a right engine of that precision may differ by; measured when it is asked for first."""
        if precision not in self._bounds:
            floor = self._differences(scores(rounded(self.model, precision), self.ids))
            self._bounds[precision] = from_floor(floor)
        return self._bounds[precision]

    def ask(self, party: Party) -> Answers:
        """Ask all probes. Raises what `party` raises where it does not answer."""
        unequal = tuple(fault for row in self.rows.rows for fault in self._texts_apart(party, row))
        unequal += tuple(fault for row in self._doors() for fault in self._fed_apart(party, row))
        return Answers(party.label, party.scores(self.ids), len(self.rows.rows) + len(self._doors()), unequal)

    def judge(self, answers: Answers, precision: Precision) -> Verdict:
        """Hold what was answered against the trained weights."""
        found, bounds = self._differences(answers.scores), self.bounds(precision)
        return Verdict(answers.party, precision, found, bounds, answers.num_texts, answers.unequal, self.rows)

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """What is scored."""
        return [row.scored for row in self.rows.rows]

    def _differences(self, theirs: Sequence[Scores]) -> Differences:
        parts = [
            np.abs(np.subtract(one.logprobs, other.logprobs)) for one, other in zip(theirs, self.scores, strict=True)
        ]
        nats = np.concatenate(parts)
        same = [np.equal(one.top_ids, other.top_ids) for one, other in zip(theirs, self.scores, strict=True)]
        at = int(nats.argmax())  # the first that is not a number, where there is one
        ends = np.cumsum([len(part) for part in parts])
        number = int(np.searchsorted(ends, at, side="right"))
        place = at - int(ends[number - 1] if number else 0)
        row, token = self.rows.rows[number], self.rows.rows[number].scored[place + 1]
        worst = (
            f"probe {row.probe.name}, token {place + 1} {decode_text(self.tokenizer, [token])!r} (id {token}): trained "
            f"{self.scores[number].logprobs[place]:.4f}, here {theirs[number].logprobs[place]:.4f}"
        )
        return Differences(nats, float(np.concatenate(same).mean()), worst)

    def _doors(self) -> list[Row]:
        """The first text and the first question of each kind, that fit into the context: what the model is really fed
        for them is asked by a request for an answer, not by one for tokens. Tools are not: engines want settings of
        their own before they take them."""
        first: dict[tuple[str, bool], Row] = {}
        for row in self.rows.rows:
            answerable = row.text is not None or (row.probe.asks and not row.probe.tools)
            if answerable and row.ids == row.scored:
                first.setdefault((row.probe.kind, row.text is None), row)
        return list(first.values())

    def _texts_apart(self, party: Party, row: Row) -> Iterable[str]:
        try:
            ids = tuple(party.ids(row))
            if ids != row.ids:
                yield f"{row.probe.name}: {apart(self.tokenizer, row.ids, ids)}"
            elif (shown := party.decoded(ids)) != (text := decode_text(self.tokenizer, ids)):
                where = _first_apart(text.encode(), shown.encode())
                yield f"{row.probe.name}: its tokens are shown as other text, {where}"
        except RequestRefused as error:
            yield f"{row.probe.name} is refused: {error}"

    def _fed_apart(self, party: Party, row: Row) -> Iterable[str]:
        try:
            ids = tuple(party.fed(row))
            if ids != row.ids:
                yield f"{row.probe.name}, asked for an answer: {apart(self.tokenizer, row.ids, ids)}"
        except RequestRefused as error:
            yield f"{row.probe.name}, asked for an answer, is refused: {error}"


def from_floor(floor: Differences) -> Bounds:
    """The bounds of a precision whose rounding alone differs by `floor`; never below those of fp32."""
    share, count = 1 - floor.top1, len(floor.nats)
    noise = 3 * math.sqrt(max(share, 1 / count) / count)  # three standard errors of a share
    return Bounds(
        mean_nats=max(FP32.mean_nats, MEAN_OF_FLOOR * floor.mean_nats),
        max_nats=max(FP32.max_nats, MAX_OF_FLOOR * floor.max_nats),
        top1=min(FP32.top1, 1 - MEAN_OF_FLOOR * share - noise),
    )


def apart(tokenizer: Any, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two rows of different tokens part, in words: by their bytes, or by their tokens where those are equal."""
    one, other = (decode_text(tokenizer, list(ids)).encode() for ids in (ours, theirs))
    if one != other:
        return _first_apart(one, other)
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"the same text in other tokens, from token {at}: trained {ours[at : at + 4]}, here {theirs[at : at + 4]}"


def _first_apart(one: bytes, other: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    cut = slice(max(0, at - CONTEXT_BYTES), at + CONTEXT_BYTES)
    return f"first at byte {at}: trained ...{one[cut]!r}, here ...{other[cut]!r}"


def table(verdicts: Sequence[Verdict]) -> str:
    """A line for each party: its figures, each with what is allowed in brackets."""
    lines = [("party", "precision", "mean |dlogp|", "max |dlogp|", "same top-1", "texts equal", "verdict")]
    for one in verdicts:
        found, bounds = one.found, one.bounds
        lines.append(
            (
                one.party,
                str(one.precision),
                f"{found.mean_nats:.2g} ({bounds.mean_nats:.2g})",
                f"{found.max_nats:.2g} ({bounds.max_nats:.2g})",
                f"{found.top1:.2%} ({bounds.top1:.2%})",
                f"{one.num_texts - len(one.unequal)} of {one.num_texts}",
                "NOT THE SAME" if one.faults else "the same",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def refuse(verdicts: Sequence[Verdict]) -> None:
    """Raises NotTheSameModel with what differs, unless all parties passed."""
    faults = [f"{one.party}: {fault}" for one in verdicts for fault in one.faults]
    if faults:
        raise NotTheSameModel("not the trained model:\n" + "\n".join(f"  {fault}" for fault in faults))
