"""A form of a model against PyTorch on the same machine: figures, and whether it is worth having."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.optimise import Optimising
from llmtrain.optimise.measure import Seen

DRAWS = 2000
FORM, FP32, BF16 = "form", "torch_fp32", "torch_bf16"


@dataclass(frozen=True)
class Estimate:
    """A figure, and where 95 of 100 redrawn sets of documents have it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Party:
    """All rounds of the form, or of PyTorch in one precision; the first round has the quality."""

    seen: tuple[Seen, ...]
    num_bytes: int
    """Of the weights' files."""

    def speed(self, kind: Literal["prefill", "decode"], size: int) -> float:
        """Tokens a second, `kind` prefill or decode, the median over rounds."""
        return median((seen.prefill if kind == "prefill" else seen.decode)[str(size)] for seen in self.seen)

    @property
    def first_token_seconds(self) -> float:
        return median(seen.first_token_seconds for seen in self.seen)

    @property
    def peak_bytes(self) -> int:
        return max(seen.peak_bytes for seen in self.seen)


def over_documents(number: int, figure: Callable[[NDArray[np.int64]], float]) -> Estimate:
    """`figure` of the documents with the given indices; the percentile bootstrap redraws the `number` documents.

    B. Efron, Bootstrap methods: another look at the jackknife (1979).
    """
    random = np.random.default_rng(0)
    drawn = [figure(random.integers(0, number, number)) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(figure(np.arange(number)), float(low), float(high))


def perplexity(seen: Seen) -> Estimate:
    """exp of the mean loss; the documents are equally long."""
    losses = np.array(seen.losses)
    return over_documents(len(losses), lambda chosen: float(np.exp(losses[chosen].mean())))


def perplexity_increase(seen: Seen, reference: Seen) -> Estimate:
    """Perplexity over the reference's, minus 1, document by document: what both find hard does not widen it."""
    differences = np.array(seen.losses) - np.array(reference.losses)
    return over_documents(len(differences), lambda chosen: float(np.expm1(differences[chosen].mean())))


def agreement(seen: Seen, reference: Seen) -> Estimate:
    """Share of positions with the same likeliest token."""
    equal = (np.array(seen.likeliest) == np.array(reference.likeliest)).mean(1)
    return over_documents(len(equal), lambda chosen: float(equal[chosen].mean()))


def figures(parties: Mapping[str, Party], sizes: Sequence[int]) -> dict[str, float]:
    """What the record keeps: the form's by plain names, PyTorch's after a slash."""
    found: dict[str, float] = {}
    reference = parties[FP32].seen[0]
    for name, party in parties.items():
        prefix = "" if name == FORM else f"{name}/"
        estimates = {"perplexity": perplexity(party.seen[0])}
        if name != FP32:
            estimates["perplexity_increase"] = perplexity_increase(party.seen[0], reference)
            estimates["top1_agreement"] = agreement(party.seen[0], reference)
        for key, estimate in estimates.items():
            found[f"{prefix}{key}"] = estimate.value
            found[f"{prefix}{key}_low"], found[f"{prefix}{key}_high"] = estimate.low, estimate.high
        for size in sizes:
            found[f"{prefix}prefill_tokens_per_second_batch_{size}"] = party.speed("prefill", size)
            found[f"{prefix}decode_tokens_per_second_batch_{size}"] = party.speed("decode", size)
        found[f"{prefix}first_token_seconds"] = party.first_token_seconds
        found[f"{prefix}peak_bytes"] = party.peak_bytes
        found[f"{prefix}weights_bytes"] = party.num_bytes
    return found


def decisive(config: Optimising) -> str:
    """The name of the speed that must be higher."""
    return f"decode_tokens_per_second_batch_{config.batch_sizes[0]}"


def objections(found: Mapping[str, float], config: Optimising) -> list[str]:
    """Why a form with these figures is not worth having; none: it is."""
    reasons = []
    if found["perplexity_increase"] > config.most_perplexity_increase:
        reasons.append(
            f"its perplexity is {found['perplexity_increase']:.2%} higher than PyTorch's in fp32 (95 % interval "
            f"{found['perplexity_increase_low']:.2%} to {found['perplexity_increase_high']:.2%}), and "
            f"optimise.most_perplexity_increase allows {config.most_perplexity_increase:.2%}"
        )
    if found["top1_agreement"] < config.least_agreement:
        reasons.append(
            f"it finds the same token likeliest at {found['top1_agreement']:.1%} of positions (95 % interval "
            f"{found['top1_agreement_low']:.1%} to {found['top1_agreement_high']:.1%}), and optimise.least_agreement "
            f"asks for {config.least_agreement:.1%}"
        )
    key = decisive(config)
    best = max(found[f"{name}/{key}"] for name in (FP32, BF16) if f"{name}/{key}" in found)
    smallest = found[f"{FP32}/weights_bytes"]
    if found[key] <= best and found["weights_bytes"] >= smallest:
        reasons.append(
            f"here it is neither faster than PyTorch ({found[key]:.0f} tokens/s against {best:.0f} at its best "
            f"precision) nor smaller ({found['weights_bytes'] / 1e6:.0f} MB against {smallest / 1e6:.0f})"
        )
    return reasons


def table(found: Mapping[str, float], config: Optimising, form: str) -> str:
    """The figures side by side, for people."""
    names = [name for name in (FP32, BF16) if f"{name}/perplexity" in found]
    prefixes = {"PyTorch fp32": f"{FP32}/", "PyTorch bf16": f"{BF16}/"}
    columns = {title: prefix for title, prefix in prefixes.items() if prefix.rstrip("/") in names} | {form: ""}

    def interval(key: str, percent: bool) -> list[str]:
        cells = []
        for prefix in columns.values():
            if f"{prefix}{key}" not in found:
                cells.append("-")
                continue
            values = [found[f"{prefix}{key}{end}"] * (100 if percent else 1) for end in ("", "_low", "_high")]
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*values))
        return cells

    def plain(key: str, scale: float, digits: int) -> list[str]:
        return [f"{found[prefix + key] * scale:.{digits}f}" for prefix in columns.values()]

    rows = {
        "perplexity (95 %)": interval("perplexity", percent=False),
        "its increase, %": interval("perplexity_increase", percent=True),
        "same likeliest token, %": interval("top1_agreement", percent=True),
    }
    for kind in ("prefill", "decode"):
        for size in config.batch_sizes:
            key = f"{kind}_tokens_per_second_batch_{size}"
            rows[f"{kind}, tokens/s, {size} together"] = plain(key, 1, 0 if kind == "prefill" else 1)
    rows["first token, ms"] = plain("first_token_seconds", 1e3, 0)
    rows["peak memory, MB"] = plain("peak_bytes", 1e-6, 0)
    rows["weights, MB"] = plain("weights_bytes", 1e-6, 1)
    lines = [["", *columns], *([name, *cells] for name, cells in rows.items())]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
