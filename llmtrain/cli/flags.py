"""The flags of a command line, told apart from its overrides, which Hydra's grammar reads."""

from dataclasses import dataclass

from llmtrain.cli import UsageError
from llmtrain.config.suggest import closest, did_you_mean


@dataclass(frozen=True)
class Flag:
    """One flag. `value` names what follows it, if anything does; `choices` are the values it may have."""

    name: str
    help: str
    short: str = ""
    value: str = ""
    choices: tuple[str, ...] = ()
    default: str = ""
    """The value of a flag whose value may be left out."""


def parse(argv: list[str], flags: list[Flag]) -> tuple[dict[str, str], list[str]]:
    """The value of each flag that is given (its own name where it takes none), and what is left: the overrides.

    Raises UsageError for an unknown flag, a missing value, and a flag given twice.
    """
    known = {spelling: flag for flag in flags for spelling in (flag.name, flag.short) if spelling}
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    waiting = next(words, None)
    while waiting is not None:
        word, waiting = waiting, next(words, None)
        if not word.startswith("-"):
            rest.append(word)
            continue
        spelling, equals, value = word.partition("=")
        if spelling not in known:
            raise UsageError(f"{spelling}: no such flag{did_you_mean(closest(spelling, known))}; --help lists them")
        flag = known[spelling]
        if flag.name in given:
            raise UsageError(f"{flag.name}: given twice")
        if equals and not flag.value:
            raise UsageError(f"{flag.name} takes no value; write '{flag.name}'")
        if flag.value and not equals:
            follows = waiting is not None and not waiting.startswith("-")
            if follows and (not flag.default or waiting in flag.choices):
                value, waiting = str(waiting), next(words, None)
            elif flag.default:
                value = flag.default
            else:
                raise UsageError(f"{flag.name} needs a value; write '{flag.name} {flag.value}'")
        if flag.choices and value not in flag.choices:
            guess = did_you_mean(closest(value, flag.choices))
            raise UsageError(f"{flag.name}: got '{value}', wants one of {', '.join(flag.choices)}{guess}")
        given[flag.name] = value if flag.value else flag.name
    return given, rest


def listing(flags: list[Flag]) -> list[str]:
    """One line of help for each flag."""
    spelled = [
        ", ".join(filter(None, (flag.short, flag.name))) + (f" {flag.value}" if flag.value else "") for flag in flags
    ]
    width = max(map(len, spelled))
    return [f"  {names:{width}}  {flag.help}" for names, flag in zip(spelled, flags, strict=True)]
