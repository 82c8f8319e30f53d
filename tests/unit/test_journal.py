"""The journal is a chain that any change breaks, that several processes extend, and that a crash does not stop."""

import json
import multiprocessing
import os

import pytest

from llmtrain.config.base import content_hash
from llmtrain.errors import IntegrityError
from llmtrain.journal import GENESIS, Journal


@pytest.fixture
def journal(tmp_path) -> Journal:
    journal = Journal(tmp_path / "outputs")
    for number in range(4):
        journal.append("run.started", run_id=f"run {number}", note="naïve\u2028line\n")
    return journal


def test_each_line_holds_the_hash_of_the_line_before(journal):
    events = journal.events()
    assert [event["number"] for event in events] == [0, 1, 2, 3]
    assert [event["previous_sha256"] for event in events] == [GENESIS, *(event["sha256"] for event in events[:3])]
    assert events[2]["facts"] == {"run_id": "run 2", "note": "naïve\u2028line\n"}
    assert journal.verify() == 4


def test_no_journal_has_no_events(tmp_path):
    assert Journal(tmp_path).events() == []
    assert Journal(tmp_path).verify() == 0


def rehashed(line: bytes) -> bytes:
    """A line changed by somebody who knows how its hash is made."""
    event = json.loads(line)
    event["facts"]["run_id"] = "forged"
    event["sha256"] = content_hash({key: value for key, value in event.items() if key != "sha256"})
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "broken_line"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"run 1", b"run 9"), *lines[2:]], 2),
        (lambda lines: [lines[0], rehashed(lines[1]), *lines[2:]], 3),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2], lines[3]], 2),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [lines[0], b"{}\n", *lines[1:]], 2),
        (lambda lines: [lines[0], b"no JSON\n", *lines[1:]], 2),
        (lambda lines: [lines[0], b"7\n", *lines[1:]], 2),
    ],
    ids=["changed", "forged", "first removed", "removed", "repeated", "swapped", "empty object", "no json", "number"],
)
def test_verify_names_the_first_line_that_does_not_follow(journal, change, broken_line):
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(change(lines)))
    with pytest.raises(IntegrityError, match=rf"journal\.jsonl:{broken_line}: the hash chain breaks"):
        journal.verify()


@pytest.mark.parametrize("kept", [1, 50, -1])
def test_a_torn_last_line_is_put_aside_and_the_chain_goes_on(journal, kept):
    lines = journal.path.read_bytes().splitlines(keepends=True)
    torn = lines[3][:kept]
    journal.path.write_bytes(b"".join(lines[:3]) + torn)
    assert journal.verify() == 3
    assert journal.append("run.finished")["number"] == 3
    assert journal.verify() == 4
    assert journal.path.with_suffix(".torn").read_bytes() == torn + b"\n"


def test_a_first_line_torn_leaves_an_empty_chain(tmp_path):
    journal = Journal(tmp_path)
    journal.path.write_bytes(b'{"number": 0')
    assert journal.append("run.started")["previous_sha256"] == GENESIS
    assert journal.verify() == 1


def test_a_damaged_last_line_is_not_built_upon(journal):
    damaged = journal.path.read_bytes() + b"damaged\n"
    journal.path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"journal\.jsonl:5"):
        journal.append("run.finished")
    assert journal.path.read_bytes() == damaged


def test_facts_that_are_no_json_leave_the_journal_as_it_was(journal):
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match="Out of range float"):
        journal.append("run.finished", loss=float("nan"))
    assert journal.path.read_bytes() == before


def test_processes_that_append_at_once_make_one_chain(tmp_path):
    def append() -> None:
        for number in range(25):
            Journal(tmp_path).append("run.started", process=os.getpid(), number=number)

    processes = [multiprocessing.get_context("fork").Process(target=append) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    journal = Journal(tmp_path)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert journal.verify() == 100
    for process in processes:  # each one's events are in its own order
        numbers = [event["facts"]["number"] for event in journal.events() if event["facts"]["process"] == process.pid]
        assert numbers == list(range(25))


def test_a_process_killed_while_it_holds_the_lock_blocks_nobody(tmp_path):
    def die_with_the_lock() -> None:
        with Journal(tmp_path)._locked() as file:
            file.write(b'{"number": 0, "time')
            file.flush()
            os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=die_with_the_lock)
    process.start()
    process.join()
    assert process.exitcode == 9
    Journal(tmp_path).append("run.started")
    assert Journal(tmp_path).verify() == 1
