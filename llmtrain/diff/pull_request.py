"""What a pull request changes in conf/: each experiment, and each pinned command line, before and after.

A command line is pinned by a file tests/golden/NAME.json of the revision before, which holds its overrides: a change of
its mathematics needs the label `changes-mathematics`.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from llmtrain.config.base import Changes
from llmtrain.config.check import check_option
from llmtrain.config.compare import Comparison, Side, compare, composed
from llmtrain.config.compose import Composer
from llmtrain.config.options import options
from llmtrain.config.revisions import Tree, tree_of
from llmtrain.config.root import TrainConfig
from llmtrain.diff.derived import Derived, derived
from llmtrain.diff.words import code, markdown, plain, table
from llmtrain.errors import UserError

LABEL = "changes-mathematics"
MARKER = "<!-- llmtrain config-diff -->"
"""The first line of the comment, by which it is found again."""
NEEDS_LABEL = f"<!-- needs the label {LABEL} -->"
"""The second line, where the label is needed."""
PLANNED_ON = "h100"
"""The option of infra that plans are made for: published figures, so that no such device need be there."""
GOLDEN = "tests/golden"
MOST_CHARACTERS = 60_000
"""GitHub takes 65,536."""


class Change(BaseModel):
    """One command line that means something else after the pull request."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    title: str
    overrides: tuple[str, ...]
    pinned: bool
    only: Literal["before", "after"] | None
    """The side that has it, where it is new or removed"""
    problem: str | None
    """Why it could not be compared"""
    comparison: Comparison | None
    derived: Derived | None
    plans: tuple[dict[str, str], dict[str, str]] | None
    """On `PLANNED_ON`, before and after, by name in words; of a plan that cannot be made, why"""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def needs_label(self) -> bool:
        """Whether it is pinned and its mathematics change, or it is not known whether they do."""
        if not self.pinned or self.only == "after":
            return False
        return self.comparison is None or bool(self.comparison.of(Changes.MATHEMATICS))


class PullRequest(BaseModel):
    """All that differs between two revisions of conf/."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    before: str
    after: str
    compared: tuple[str, ...]
    """Every experiment and pinned command line that was looked at"""
    changes: tuple[Change, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def needs_label(self) -> bool:
        return any(change.needs_label for change in self.changes)


@dataclass(frozen=True)
class _Line:
    """A command line to compare."""

    title: str
    overrides: tuple[str, ...]
    pinned: bool
    experiment: str | None


def examine(before: str, after: str | None, top: Path) -> PullRequest:
    """Compare every experiment and pinned command line in two revisions of the repository at `top`.

    Raises UserError where a revision does not exist, or has no conf/.
    """
    with ExitStack() as stack:
        trees = [stack.enter_context(tree_of(revision, top, ["conf", GOLDEN])) for revision in (before, after)]
        for tree in trees:
            if not (tree.top / "conf" / "train.yaml").is_file():
                raise UserError(f"{tree.name} has no conf/train.yaml in {top}: nothing to compare")
        outputs = Path(stack.enter_context(TemporaryDirectory(prefix="llmtrain-plans-")))
        work = _Work(trees[0], trees[1], outputs)
        lines = work.lines()
        changes = [change for line in lines if (change := work.change(line))]
    return PullRequest(
        before=trees[0].name, after=trees[1].name, compared=tuple(line.title for line in lines), changes=tuple(changes)
    )


class _Work:
    """Two trees, each with its composer."""

    def __init__(self, before: Tree, after: Tree, outputs: Path) -> None:
        self.trees = (before, after)
        self.composers = [Composer(shipped=tree.conf) for tree in self.trees]
        self.options = [options([tree.conf]) for tree in self.trees]
        self.outputs = outputs
        self.planned: dict[str, dict[str, str]] = {}

    def lines(self) -> list[_Line]:
        """The pinned command lines, as they were before; the experiments; the defaults."""
        golden = [self._golden(tree) for tree in self.trees]
        found = {name: (overrides, name in golden[0]) for name, overrides in {**golden[1], **golden[0]}.items()}
        experiments = sorted({name for one in self.options for name in one.get("experiment", {})})
        for name in experiments:
            if name not in found:
                found[name] = (self._standing_alone(name), False)
        if () not in [overrides for overrides, _ in found.values()]:
            found["default"] = ((), False)
        return [
            _Line(" ".join(overrides) or "the defaults", overrides, pinned, name if name in experiments else None)
            for name, (overrides, pinned) in sorted(found.items())
        ]

    def change(self, line: _Line) -> Change | None:
        """What happens to it; None where nothing does."""
        there = [line.experiment is None or line.experiment in one.get("experiment", {}) for one in self.options]
        only: Literal["before", "after"] | None = None if all(there) else "before" if there[0] else "after"
        found: Comparison | None = None
        figures: Derived | None = None
        problem, plans = None, None
        if only is None:
            try:
                before, after = (self._side(number, line.overrides) for number in (0, 1))
                found = compare(before, after)
                if not found.differences and not self._hardware_differs(line.overrides):
                    return None
                figures = derived(before, after)
            except UserError as error:
                problem = str(error)
        if problem is None:
            first, second = (self._plan(n, line.overrides) if there[n] else {} for n in (0, 1))
            plans = (first, second)
        return Change(
            title=line.title,
            overrides=line.overrides,
            pinned=line.pinned,
            only=only,
            problem=problem,
            comparison=found,
            derived=figures,
            plans=plans,
        )

    def _golden(self, tree: Tree) -> dict[str, tuple[str, ...]]:
        """The overrides of each pinned command line, by name."""
        found = {}
        for path in sorted((tree.top / GOLDEN).glob("*.json")):
            try:
                found[path.stem] = tuple(map(str, json.loads(path.read_bytes())["overrides"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{GOLDEN}/{path.name} of {tree.name} has no list of overrides; write it by scripts/golden"
                ) from error
        return found

    def _standing_alone(self, name: str) -> tuple[str, ...]:
        """The experiment's override, with stand-ins for what it leaves to the user."""
        number = 1 if name in self.options[1].get("experiment", {}) else 0
        path, found = self.options[number]["experiment"][name], self.options[number]
        needed, _ = check_option(self.composers[number], "experiment", name, path, found)
        return (f"experiment={name}", *needed)

    def _side(self, number: int, overrides: Sequence[str]) -> Side:
        tree = self.trees[number]
        return composed(tree.name, self.composers[number].check(list(overrides)), str(tree.top))

    def _on_published(self, number: int, overrides: Sequence[str]) -> TrainConfig:
        others = [line for line in overrides if not line.startswith("infra=")]
        return self._side(number, [*others, f"infra={PLANNED_ON}"]).config

    def _hardware_differs(self, overrides: Sequence[str]) -> bool:
        """Whether the same config is planned otherwise: what the device can do, or costs, was changed."""
        try:
            first, second = (self._on_published(number, overrides).infra for number in (0, 1))
        except UserError:
            return False
        return first != second

    def _plan(self, number: int, overrides: Sequence[str]) -> dict[str, str]:
        from llmtrain.plan.table import figures
        from llmtrain.training.planned import planner

        try:
            config = self._on_published(number, overrides)
            key = config.model_dump_json(exclude={"name", "tracking", "outputs_dir"})
            if key not in self.planned:
                self.planned[key] = figures(planner(config, self.outputs, baseline_bytes=0).plan())
        except (UserError, OSError) as error:  # a published model that is not here
            return {"no plan": " ".join(str(error).split())}
        return self.planned[key]


def comment(found: PullRequest) -> str:
    """The comment on the pull request, in Markdown; it is found again by its first line, `MARKER`."""
    same = len(found.compared) - len(found.changes)
    lines = [MARKER, *([NEEDS_LABEL] if found.needs_label else []), "## What this changes in conf/", ""]
    lines.append(
        f"{code(found.before)} to {code(found.after)}: of {len(found.compared)} experiments and pinned command lines "
        f"{len(found.changes)} differ and {same} stay as they are."
    )
    if found.needs_label:
        which = ", ".join(code(change.title) for change in found.changes if change.needs_label)
        lines += ["", f"**The mathematics of what is pinned change ({which}): this needs the label `{LABEL}`.**"]
    parts, left_out = ["\n".join(lines)], []
    for change in found.changes:
        section = _section(change)
        if sum(map(len, parts)) + len(section) > MOST_CHARACTERS:
            left_out.append(change.title)
        else:
            parts.append(section)
    if left_out:
        which = ", ".join(map(code, left_out))
        parts.append(f"No room for {which[:2000]}: `llmtrain diff BEFORE..AFTER OVERRIDES` shows each.")
    return "\n\n".join(parts)


def _section(change: Change) -> str:
    parts = [f"### {code(change.title)}{' (pinned)' if change.pinned else ''}"]
    if change.only:
        parts.append({"before": "**removed**", "after": "**new**"}[change.only])
    if change.problem:
        parts.append(f"**cannot be compared**\n\n```\n{change.problem.replace('```', chr(0x2019) * 3)}\n```")
    if change.comparison and change.derived:
        parts.append(markdown(change.comparison, change.derived))
    if change.plans:
        before, after = change.plans
        rows = [
            [name, plain(before.get(name, "")), plain(after.get(name, ""))] for name in dict.fromkeys([*before, *after])
        ]
        parts.append(f"plan on `infra={PLANNED_ON}`\n\n" + table(["", "before", "after"], rows))
    return "\n\n".join(parts)
