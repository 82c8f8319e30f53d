"""Two configs: what differs, what each difference changes, and whether it is another run."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from llmtrain.config.base import Changes, NameOf, Settings
from llmtrain.config.compose import Checked, plain
from llmtrain.config.frozen import SCHEMA_VERSION, FrozenRun, Resolved, with_what_came_later
from llmtrain.config.origins import Origins
from llmtrain.config.problems import Problem, is_valid
from llmtrain.config.root import TrainConfig
from llmtrain.config.schema import Key
from llmtrain.errors import UserError

RESOLVED = {
    "text_sha256": Changes.DATA,
    "pairs_sha256": Changes.DATA,
    "chats_sha256": Changes.DATA,
    "tokenizer_sha256": Changes.DATA,
    "parent_weights_sha256": Changes.MATHEMATICS,
    "parent_shape_sha256": Changes.MATHEMATICS,
    "teacher_weights_sha256": Changes.MATHEMATICS,
}
"""What a difference in a run's resolved references changes; the others say where something lies."""


@dataclass(frozen=True)
class Side:
    """One of the two configs that are compared."""

    name: str
    config: TrainConfig
    place: Callable[[Key], str | None]
    """What set a setting last, in words; None where that is not known."""
    run: FrozenRun | None = None


class Difference(BaseModel):
    """One setting that is not the same on both sides."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    key: str
    changes: Changes
    only: Literal["before", "after"] | None
    """The side that has the setting, where the other has none"""
    before: Any
    after: Any
    meaning: str
    """The first sentence of its description"""
    set_by_before: str | None
    """What set it: a file and line, or an override"""
    set_by_after: str | None
    names_content: bool
    """The value names a file or a model: what it changes depends on what is behind the name"""


class Verdict(BaseModel):
    """What all the differences together make of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    is_another_run: bool | None
    """Whether the run id changes; null where that depends on data or models that nobody has looked at"""
    changes: Changes | None
    """The gravest difference; null where there is none"""
    text: str


class Comparison(BaseModel):
    """`before` and `after`, compared."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    before: str
    after: str
    verdict: Verdict
    differences: tuple[Difference, ...]
    """The gravest first, each kind in the order of the config"""

    def of(self, changes: Changes) -> list[Difference]:
        """The differences of one kind."""
        return [one for one in self.differences if one.changes == changes]


def composed(name: str, checked: Checked, tree: str = "") -> Side:
    """The side that a composed command line is; `tree` is taken off the places of files.

    Where conf/ is of an older schema, what that lacks does what was done before. Raises UserError where it is wrong.
    """
    config, wrong = checked.config, checked.problems
    if config is None or wrong:
        config, wrong = _of_an_older_schema(checked)
    if config is None:
        problems = "\n".join(f"  {problem}".replace(f"{tree}/", "") for problem in wrong)
        count = "1 problem" if len(wrong) == 1 else f"{len(wrong)} problems"
        raise UserError(
            f"{name}: {count}; settings that this llmtrain does not know belong to another version of it:\n{problems}"
        )
    origins: Callable[[], Origins] = checked.origins

    def place(key: Key) -> str | None:
        found = origins().place(key)
        return found.replace(f"{tree}/", "") if found and tree else found

    return Side(name, config, place)


def of_run(name: str, run: FrozenRun) -> Side:
    """The side that a run is."""
    return Side(name, run.config, lambda key: None, run)


def _of_an_older_schema(checked: Checked) -> tuple[TrainConfig | None, list[Problem]]:
    """The config, if all that is wrong with it is what later schemas changed; else None, and what else is wrong."""
    if checked.composed is None:
        return None, checked.problems
    data, open_keys, _ = plain(checked.composed)  # `checked.data` has been mended to find more problems
    version = data.get("schema_version")
    if not isinstance(version, int) or version >= SCHEMA_VERSION:
        return None, checked.problems
    try:
        later = with_what_came_later(data, version + 1)
    except (AttributeError, KeyError, TypeError):  # an override put something else where a group belongs
        return None, checked.problems
    moved = (_paths(data) ^ _paths(later)) - {".".join(key) for key in open_keys} | {"schema_version"}
    wrong = [one for one in checked.problems if one.key not in moved or (one.place or "").startswith("override")]
    if wrong or not is_valid(later, TrainConfig):
        return None, wrong or checked.problems
    return TrainConfig.model_validate_json(json.dumps(later, default=str)), []


def _paths(data: dict[str, Any], prefix: str = "") -> set[str]:
    """The dotted name of every entry, groups included."""
    found = set()
    for name, value in data.items():
        found.add(prefix + name)
        if isinstance(value, dict):
            found |= _paths(value, f"{prefix}{name}.")
    return found


def compare(before: Side, after: Side) -> Comparison:
    """What differs between two sides; of two runs also what their references were."""
    hashes_known = before.run is not None and after.run is not None
    found = [
        _difference(key, old, new, before, after, hashes_known)
        for key, old, new in _pairs(before.config, after.config)
        if old is None or new is None or old.value != new.value
    ]
    if before.run and after.run:
        found += _resolved(before.run.resolved, after.run.resolved)
    order = list(Changes)
    found.sort(key=lambda one: order.index(one.changes))
    return Comparison(
        before=before.name, after=after.name, verdict=_verdict(before, after, found), differences=tuple(found)
    )


@dataclass(frozen=True)
class _Leaf:
    group: Settings
    field: FieldInfo
    value: Any


def _leaves(group: Settings, key: Key = ()) -> Iterator[tuple[Key, _Leaf]]:
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if isinstance(value, Settings):
            yield from _leaves(value, (*key, name))
        else:
            yield (*key, name), _Leaf(group, field, value)


def _pairs(before: Settings, after: Settings) -> Iterator[tuple[Key, _Leaf | None, _Leaf | None]]:
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for key in dict.fromkeys([*old, *new]):
        yield key, old.get(key), new.get(key)


def _difference(
    key: Key, old: _Leaf | None, new: _Leaf | None, before: Side, after: Side, hashes_known: bool
) -> Difference:
    leaf = new or old
    assert leaf is not None, "a key is from one side or the other"
    (changes,) = [note for note in leaf.field.metadata if isinstance(note, Changes)]
    behind = [note.changes for note in leaf.field.metadata if isinstance(note, NameOf)]
    names_content = bool(behind) and not hashes_known
    meaning = leaf.field.description or ""
    if key[-1] == "kind":
        meaning = type(leaf.group).__doc__ or ""
    return Difference(
        key=".".join(key),
        changes=behind[0] if names_content else changes,
        only="after" if old is None else "before" if new is None else None,
        before=old.value if old else None,
        after=new.value if new else None,
        meaning=first_sentence(meaning),
        set_by_before=before.place(key) if old else None,
        set_by_after=after.place(key) if new else None,
        names_content=names_content,
    )


def _resolved(before: Resolved, after: Resolved) -> Iterator[Difference]:
    for name in Resolved.model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield Difference(
                key=f"resolved.{name}",
                changes=RESOLVED.get(name, Changes.SURFACE),
                only=None,
                before=old,
                after=new,
                meaning="",
                set_by_before=None,
                set_by_after=None,
                names_content=False,
            )


def first_sentence(text: str) -> str:
    """Up to the first full stop that a space follows, without line breaks."""
    words = " ".join(cleandoc(text).split())
    sentence, stop, _ = words.partition(". ")
    return sentence + stop.rstrip()


def _verdict(before: Side, after: Side, found: list[Difference]) -> Verdict:
    gravest = found[0].changes if found else None
    if before.run and after.run:
        return _verdict_on_runs(before.run, after.run, gravest)
    same_mathematics = before.config.fields_that_change(Changes.MATHEMATICS) == after.config.fields_that_change(
        Changes.MATHEMATICS
    )
    names = [one.key for one in found if one.names_content]
    match gravest:
        case None:
            return Verdict(is_another_run=False, changes=gravest, text="the same: nothing differs")
        case Changes.MATHEMATICS if not same_mathematics:
            text = "another run: the mathematics differ, so the run id changes"
            return Verdict(is_another_run=True, changes=gravest, text=text)
        case Changes.MATHEMATICS | Changes.DATA:
            unless = f"what {_listed(names)} names differs" if names else "the prepared data differ"
            text = f"another run if {unless}: the run id has the content's hash; the settings' mathematics are the same"
            return Verdict(is_another_run=None, changes=gravest, text=text)
        case Changes.PERFORMANCE:
            text = "the same run, other speed or memory: the run id stays, results are equal within rounding"
        case Changes.SURFACE:
            text = "the same run under other names or with other reports: the run id stays"
    return Verdict(is_another_run=False, changes=gravest, text=text)


def _verdict_on_runs(before: FrozenRun, after: FrozenRun, gravest: Changes | None) -> Verdict:
    ids = f"{before.run_id} and {after.run_id}"
    if before.run_id == after.run_id:
        words = {
            None: "nothing differs",
            Changes.PERFORMANCE: "at another speed or with other memory",
            Changes.DATA: "the data's settings differ and the prepared data do not",
        }
        text = f"the same run, {before.run_id}: {words.get(gravest, 'other names or other reports')}"
        return Verdict(is_another_run=False, changes=gravest, text=text)
    match gravest:
        case Changes.MATHEMATICS:
            text = f"two runs, {ids}: the mathematics differ"
        case Changes.DATA:
            text = f"two runs, {ids}: the data differ, the mathematics are the same"
        case _:
            text = f"two runs, {ids}, of the same mathematics and data: attempt {before.attempt} and {after.attempt}"
    return Verdict(is_another_run=True, changes=gravest, text=text)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
