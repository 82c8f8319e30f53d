"""What is found, in words and in figures."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """`data stall`, `evaluations`, `checkpoints`, `recompiles`, `host syncs`, `padding`, `loss spike`,
    `divergence`, `not finite`."""
    seen: str
    """A sentence with the figures."""
    remedies: tuple[str, ...]
    """Overrides that help, the most likely first, each with what it does."""
    cost_share: float | None = None
    """Share of the run's time that it takes; None where it is not a matter of time."""
    details: tuple[str, ...] = ()
    """Lines of evidence."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures for machines."""


@dataclass(frozen=True)
class Examination:
    """All that was looked at, and what was found."""

    run: str
    state: str
    looked_at: tuple[str, ...]
    """A line for each question that was asked, with its figures."""
    notes: tuple[str, ...]
    """What could not be looked at, and why."""
    findings: tuple[Finding, ...]

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """For people: the findings, or what was looked at where there is none."""
        lines = [f"{self.run}: {self.state}", ""]
        for number, finding in enumerate(self.findings, 1):
            cost = f" ({finding.cost_share:.0%} of the time)" if finding.cost_share is not None else ""
            lines += [f"{number}. {finding.kind}{cost}: {finding.seen}"]
            lines += [f"     {detail}" for detail in finding.details]
            lines += [f"   -> {remedy}" for remedy in finding.remedies] + [""]
        if not self.findings:
            lines += ["nothing found"]
        lines += ["looked at:", *(f"  {line}" for line in self.looked_at)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
