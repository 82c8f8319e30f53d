"""docs/interfaces.md says what the code does: codes, timeouts, variables, modules, links."""

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub
import pytest

from llmtrain import errors
from llmtrain.cli.demo import STOP_SECONDS
from llmtrain.launch.aks.cluster import CONNECT_S, READ_S
from llmtrain.processes import STOPS
from llmtrain.serving.litserve_server import LAST_ANSWERS_S
from llmtrain.serving.supervise import END_S
from llmtrain.telemetry.comet_tracker import FLUSH_SECONDS
from llmtrain.telemetry.outbox import WAITING_SHARE
from llmtrain.training.ranks import group
from llmtrain.training.ranks.torchrun import OTHER_NODES_S

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "interfaces.md"
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "llmtrain").rglob("*.py"))}
LEAVES_THE_PROCESS = re.compile(
    r"fcntl\.flock|subprocess\.run|signal\.signal\(|MlflowClient\(|comet_ml\.start|socket|urlopen|from_pretrained\(name"
)


def section(heading: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", PAGE.read_text().partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!`)\|", line)[1:-1]] for line in lines]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def facts(text: str) -> dict[str, str]:
    """What stands there as `NAME=value`."""
    return dict(re.findall(r"`(\w+)=([^`]+)`", text))


def calls() -> Iterator[ast.Call]:
    for tree in SOURCES.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def variables_that_the_code_sets() -> dict[str, str]:
    """`os.environ[...] = ...` and `os.environ.setdefault(..., ...)`."""
    found = {}
    for call in calls():
        if ast.unparse(call.func) == "os.environ.setdefault":
            found[ast.literal_eval(call.args[0])] = value_of(call.args[1])
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("os.environ["):
                found[ast.literal_eval(node.targets[0].slice)] = value_of(node.value)
    return found


def value_of(node: ast.expr) -> str:
    """A literal's value; `…` for what is computed."""
    return ast.literal_eval(node) if isinstance(node, ast.Constant) else "…"


@pytest.mark.parametrize("link", sorted(set(links(PAGE.read_text()))))
def test_link_leads_somewhere(link: str):
    name, _, anchor = link.partition("#")
    page = PAGE.parent / name if name else PAGE
    assert page.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]


def test_every_module_that_talks_to_another_process_is_listed():
    listed = {(PAGE.parent / link).resolve() for link in links(section("Arrows"))}
    talking = {path for path in SOURCES if LEAVES_THE_PROCESS.search(path.read_text())}
    assert len(talking) >= 8
    assert talking <= listed


def test_every_schema_of_a_record_is_listed():
    listed = {(PAGE.parent / link).resolve() for link in links(PAGE.read_text())}
    assert set((ROOT / "docs" / "schemas").rglob("*.json")) <= listed


def test_exit_codes_are_those_of_the_errors():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.LLMTrainError]
    expected: dict[int, set[str]] = {0: set(), 1: set(), 128 + signal.SIGPIPE: set()}
    for kind in kinds:
        expected.setdefault(kind.exit_code, set()).add(kind.__name__)
    named = {kind.__name__ for kind in kinds}
    listed = {int(code): set(re.findall(r"\w+", who)) & named for code, who, _ in rows("Exit codes")}
    assert listed == expected


def test_environment_variables_are_those_that_the_code_sets():
    assert facts(section("Environment variables")) == variables_that_the_code_sets()


def test_timeouts_are_those_of_the_code_and_the_libraries():
    values = [word.value for call in calls() for word in call.keywords if word.arg == "timeout"]
    given = {ast.unparse(value) for value in values if isinstance(value, ast.Constant) or ast.unparse(value).isupper()}
    within = {"60", "False"}  # between threads, for a look at an interpreter; LitServe's own, which is switched off
    assert given - within == {"5", "FLUSH_SECONDS", "LAST_ANSWERS_S", "OTHER_NODES_S", "TIMEOUT"}
    assert (
        facts(section("Arrows"))
        == {
            "busy_timeout": "20000",  # tests/conf/test_schemas.py asks a database of ours
            "timeout": "5",
            "FLUSH_SECONDS": str(FLUSH_SECONDS),
            "LAST_ANSWERS_S": str(LAST_ANSWERS_S),
            "END_S": str(END_S),
            "STOP_SECONDS": str(STOP_SECONDS),
            "CONNECT_S": str(CONNECT_S),
            "READ_S": str(READ_S),
            "OTHER_NODES_S": str(OTHER_NODES_S),
            "TIMEOUT": str(group.TIMEOUT.total_seconds())[:-2],
            "WAITING_SHARE": str(WAITING_SHARE),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(hub.DEFAULT_DOWNLOAD_TIMEOUT),
            "HF_HUB_ETAG_TIMEOUT": str(hub.DEFAULT_ETAG_TIMEOUT),
        }
    )


def test_signals_are_those_that_a_run_handles():
    (arrow,) = [row for row in rows("Arrows") if row[1] == "terminal, scheduler → run"]
    assert set(re.findall(r"SIG[A-Z0-9]+", arrow[2])) == {number.name for number in STOPS}


def test_arrows_are_numbered_and_whole():
    table = rows("Arrows")
    assert [row[0] for row in table] == [str(number) for number in range(1, len(table) + 1)]
    assert all(len(row) == 8 and all(row) for row in table)
