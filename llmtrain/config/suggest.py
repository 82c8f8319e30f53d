"""What the user probably meant: the nearest known name."""

from collections.abc import Iterable


def distance(first: str, second: str) -> int:
    """Letters dropped, added, replaced, or swapped with their neighbour, between two words.

    Optimal string alignment: Damerau-Levenshtein without editing a swapped pair again.
    """
    before: list[int] = []
    above = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == second[j - 2] and other == first[i - 2]:
                row[j] = min(row[j], before[j - 2] + 1)
        before, above = above, row
    return above[-1]


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The names that `word` was probably meant to be, several where they are equally near, none where all are far.

    Whole dotted names are compared first, then their last parts (`model.lr` and `lr` find `trainer.lr`), then parts of
    the last parts (`trainer.warmup` finds `trainer.warmup_tokens`).
    """
    whole = {name: name for name in known}
    last = {name: name.rpartition(".")[2] for name in whole}
    end = word.rpartition(".")[2]
    return _nearest(word, whole) or _nearest(end, last) or [name for name in last if len(end) > 2 and end in last[name]]


def _nearest(word: str, spelled: dict[str, str]) -> list[str]:
    """The names whose spelling is the fewest edits away from `word`, if that is at most a quarter of its letters."""
    limit = max(1, len(word) // 4)
    near = {name: spelling for name, spelling in spelled.items() if abs(len(spelling) - len(word)) <= limit}
    distances = {name: distance(word, spelling) for name, spelling in near.items()}
    least = min(distances.values(), default=limit + 1)
    return [name for name in distances if distances[name] == least] if least <= limit else []


def did_you_mean(names: list[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or nothing where there is no guess."""
    return f"; did you mean {' or '.join(repr(name) for name in names[:3])}?" if names else ""
