"""Comparisons for people: as text for a terminal, as Markdown for a comment on a pull request."""

import json
from collections.abc import Sequence
from typing import Any

from llmtrain.config.base import Changes
from llmtrain.config.compare import Comparison, Difference
from llmtrain.diff.derived import POINTS, Derived, Quantity

HEADINGS = {
    Changes.MATHEMATICS: "changes the mathematics",
    Changes.DATA: "changes the data",
    Changes.PERFORMANCE: "performance only",
    Changes.SURFACE: "cosmetic",
}
ABSENT, UNKNOWN = "(no such setting)", "not known before the data are prepared"


def text(found: Comparison, figures: Derived) -> str:
    """For a terminal: the verdict first, then the differences by what they change, then the derived quantities."""
    parts = [f"{found.before} -> {found.after}\n{found.verdict.text}"]
    for changes, heading in HEADINGS.items():
        if differences := found.of(changes):
            width = max(len(one.key) for one in differences)
            lines = [line for one in differences for line in _lines(one, width)]
            parts.append("\n".join([heading, *lines]))
    scalars = [one for one in figures.quantities if not _is_curve(one)]
    width = max((len(one.name) for one in scalars), default=0)
    lines = [f"  {one.name:{width}}  {_figure(one.before)} -> {_figure(one.after)}" for one in scalars]
    for one in figures.quantities:
        if _is_curve(one):
            lines += [f"  {one.name:14}" + "".join(f"{share:>9.0%}" for share in POINTS)]
            lines += [f"    {side:12}{_curve(value)}" for side, value in (("before", one.before), ("after", one.after))]
    if figures.not_counted:
        lines.append(f"  parameters and FLOPs are not counted: {figures.not_counted}")
    if lines:
        parts.append("\n".join(["derived", *lines]))
    return "\n\n".join(parts)


def markdown(found: Comparison, figures: Derived) -> str:
    """For a comment: the same, as tables. What comes from files stands as code, so that it cannot format anything."""
    parts = [f"**{found.verdict.text}**"]
    for changes, heading in HEADINGS.items():
        if differences := found.of(changes):
            rows = [
                [code(one.key), *_values(one), code(_place(one)) if _place(one) else "", plain(one.meaning)]
                for one in differences
            ]
            parts.append(f"{heading}\n\n" + table(["setting", "before", "after", "set by", "meaning"], rows))
    scalars = [[one.name, _figure(one.before), _figure(one.after)] for one in figures.quantities if not _is_curve(one)]
    if scalars:
        parts.append("derived\n\n" + table(["quantity", "before", "after"], scalars))
    for one in figures.quantities:
        if _is_curve(one):
            rows = [[side, *_points(value)] for side, value in (("before", one.before), ("after", one.after))]
            parts.append(table([one.name, *(f"{share:.0%}" for share in POINTS)], rows))
    if figures.not_counted:
        parts.append(f"Parameters and FLOPs are not counted: {plain(figures.not_counted)}")
    return "\n\n".join(parts)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value: str) -> str:
    """`value` as code in a cell of a table, whatever is in it."""
    return f"`{' '.join(value.split()).replace('`', chr(0x2019)).replace('|', chr(0xA6))}`"


def plain(value: str) -> str:
    """`value` as text in a cell: what stands between backticks is code, nothing else formats."""
    parts = " ".join(value.split()).split("`")
    if len(parts) % 2 == 0:  # one without its partner
        parts = ["".join(parts)]
    return "".join(code(part) if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(value: str) -> str:
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;")
    return "".join(f"\\{letter}" if letter in "|*_[]#!\\" else letter for letter in value)


def shown(value: Any) -> str:
    """A setting's value, as YAML has it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return json.dumps(list(value), ensure_ascii=False)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _lines(one: Difference, width: int) -> list[str]:
    old, new = (ABSENT if one.only == side else shown(value) for side, value in _other_sides(one))
    lines = [f"  {one.key:{width}}  {old} -> {new}" + (f"   {_place(one)}" if _place(one) else "")]
    return [*lines, f"  {'':{width}}    {one.meaning}"] if one.meaning else lines


def _values(one: Difference) -> list[str]:
    return [ABSENT if one.only == side else code(shown(value)) for side, value in _other_sides(one)]


def _other_sides(one: Difference) -> list[tuple[str, Any]]:
    """(the side that has it where this one has not, the value here), before first."""
    return [("after", one.before), ("before", one.after)]


def _place(one: Difference) -> str:
    return one.set_by_after or one.set_by_before or ""


def _is_curve(one: Quantity) -> bool:
    return isinstance(one.before, tuple) or isinstance(one.after, tuple)


def _figure(value: Any) -> str:
    match value:
        case None:
            return UNKNOWN
        case float():
            return f"{value:.4g}"
    return f"{value:,}"


def _points(value: Any) -> list[str]:
    return [f"{point:.3g}" for point in value] if isinstance(value, tuple) else [UNKNOWN, *[""] * (len(POINTS) - 1)]


def _curve(value: Any) -> str:
    return "".join(f"{point:>9.3g}" for point in value) if isinstance(value, tuple) else f" {UNKNOWN}"
