"""`llmtrain jobs`: what was submitted, and how it stands."""

import json
import sys
import time
from pathlib import Path

from llmtrain.cli import UsageError, exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.errors import RunFailed, TryAgain, UserError
from llmtrain.launch.search import SearchDirectory, in_words
from llmtrain.launch.status import ENDED, Status, cancel, engines_log, statuses
from llmtrain.launch.sweeps import SweepDirectory, all_sweeps

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--outputs", "the outputs directory (outputs)", "", "DIR"),
    Flag("--follow", "with logs: go on until the job has ended", "-f"),
    Flag("--json", "for machines: the list of runs"),
]
USAGE = """llmtrain jobs [FLAG] [SWEEP [RUN]]           every sweep; one sweep's runs
llmtrain jobs logs [-f] SWEEP [RUN]          what a run prints; without RUN, of the only one
llmtrain jobs wait SWEEP                     until all have ended; the exit code is 3 where a run has failed
llmtrain jobs cancel SWEEP [RUN]             end the jobs, or a whole search; runs save first
llmtrain jobs resume SWEEP                   go on with a search that was stopped, or whose controller has gone
llmtrain jobs collect SWEEP                  table, plots, and the best point as an experiment file

SWEEP is the id that the submission printed (or its first digits), RUN a run's id or number in the list.
"""
VERBS = ("logs", "wait", "cancel", "resume", "collect")
POLL_S = 1.0


@exits
def main(argv: list[str] | None = None) -> int:
    """List, follow, wait for or cancel what was submitted."""
    flags, words = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    outputs = Path(flags.get("--outputs", "outputs"))
    verb = words.pop(0) if words and words[0] in VERBS else "list"
    if "--follow" in flags and verb != "logs":
        raise UsageError("--follow goes with `llmtrain jobs logs`")
    if not words:
        if verb != "list":
            raise UsageError(f"llmtrain jobs {verb} needs a sweep; `llmtrain jobs` lists them")
        return _list_sweeps(outputs, "--json" in flags)
    place = _sweep(outputs, words[0])
    match verb:
        case "list":
            _show(_chosen(place, words[1:]), place, "--json" in flags)
        case "logs":
            return _logs(place, words[1:], "--follow" in flags)
        case "wait":
            return _wait(place)
        case "cancel":
            _cancel(place, words[1:])
        case "resume":
            _resume(place)
        case "collect":
            from llmtrain.launch.collect import collect

            print(collect(place))
    return 0


def _cancel(place: SweepDirectory, words: list[str]) -> None:
    search = SearchDirectory(place)
    if search.exists and not words:
        search.stop.touch()  # a controller would take what has ended for a verdict, and propose the next
        if search.searching:
            print("the search is told to stop, and its runs to save")
            return
    chosen = _chosen(place, words)
    cancel(place, chosen)
    print(f"{sum(status.state not in ENDED for status in chosen)} told to stop")


def _resume(place: SweepDirectory) -> None:
    search = SearchDirectory(place)
    if not search.exists:
        raise UserError(f"{place.path.name} is a grid: the command that submitted it submits what has not ended well")
    from llmtrain.launch.searching import start_controller

    start_controller(search)
    print(in_words(search))


def _sweep(outputs: Path, name: str) -> SweepDirectory:
    found = [place for place in all_sweeps(outputs) if place.path.name.startswith(name)]
    if len(found) > 1:
        raise UserError(f"{name}: begins the ids of {', '.join(place.path.name for place in found)}; write more of it")
    place = found[0] if found else SweepDirectory(outputs, name)
    place.read()
    return place


def _chosen(place: SweepDirectory, words: list[str]) -> list[Status]:
    found = statuses(place)
    if not words:
        return found
    [name, *_] = words
    chosen = [one for number, one in enumerate(found, 1) if name in (str(number), one.directory.name)]
    if not chosen:
        raise UserError(f"{name}: no such run in sweep {place.path.name}; `llmtrain jobs {place.path.name}` lists them")
    return chosen


def _list_sweeps(outputs: Path, as_json: bool) -> int:
    lines, found = [], []
    for place in all_sweeps(outputs):
        sweep, runs = place.read(), statuses(place)
        counts: dict[str, int] = {}
        for status in runs:
            counts[status.state] = counts.get(status.state, 0) + 1
        found.append(
            {"sweep": sweep.sweep_id, "engine": sweep.engine, "created_at_utc": sweep.created_at_utc, **counts}
        )
        words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if (search := SearchDirectory(place)).exists:
            words = f"{in_words(search)}; {words}"
        lines.append(f"{sweep.sweep_id}  {sweep.engine:6} {sweep.created_at_utc[:16]}  {words}")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(
            "\n".join(lines) or f"nothing was submitted to {outputs}; see `python train.py --help`, --detach and infra="
        )
    return 0


def _show(found: list[Status], place: SweepDirectory, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_as_data(status) for status in found], indent=2))
        return
    if (search := SearchDirectory(place)).exists:
        print(in_words(search))
    varied = place.read().varied
    rows = [["", "run", "state", "tokens", "loss", "ETA", "node", "job", *varied]]
    for number, status in enumerate(found, 1):
        values = dict(line.partition("=")[::2] for line in status.point.overrides)
        done = f"{status.tokens:,}" + (f" ({status.tokens / status.total_tokens:.0%})" if status.total_tokens else "")
        rows.append(
            [
                str(number),
                status.directory.name,
                status.state + (f" ({status.job.reason})" if status.job.reason and status.state != "finished" else ""),
                done,
                "" if status.loss is None else f"{status.loss:.4f}",
                str(status.eta or ""),
                status.node,
                status.handle.rpartition("/")[2],
                *(values.get(key, "") for key in varied),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for point in place.begun().values():
        if point.verdict == "failed":
            print(f"point {point.number}, {' '.join(point.overrides)}: failed: {point.reason}")


def _as_data(status: Status) -> dict[str, object]:
    return {
        "run": status.directory.name,
        "directory": str(status.directory),
        "overrides": list(status.point.overrides),
        "state": status.state,
        "reason": status.job.reason,
        "job": status.handle,
        "node": status.node,
        "starts": status.starts,
        "step": status.step,
        "tokens": status.tokens,
        "total_tokens": status.total_tokens,
        "loss": status.loss,
        "eta_seconds": status.eta.total_seconds() if status.eta else None,
    }


def _logs(place: SweepDirectory, words: list[str], follow: bool) -> int:
    """What the run has printed; with `follow`, until its job has ended."""
    chosen = _chosen(place, words)
    if len(chosen) > 1:
        raise UsageError(f"sweep {place.path.name} has {len(chosen)} runs: name one of them, by number or id")
    [status] = chosen
    path, position = status.directory / "log.txt", 0
    while True:
        [status] = _chosen(place, [status.directory.name])
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                sys.stdout.write(file.read().decode(errors="replace"))
                position = file.tell()
            sys.stdout.flush()
        if status.state in ENDED or not follow:
            if not path.exists():
                nothing = f"{status.directory} has printed nothing yet: {status.state} {status.job.reason}"
                print(engines_log(status) or nothing)
            return 0
        time.sleep(POLL_S)


def _wait(place: SweepDirectory) -> int:
    """Until every run's job has ended, and the search that proposes them; a line each time that something changes."""
    before, search = "", SearchDirectory(place)
    while True:
        searching = search.exists and search.searching
        found = statuses(place)
        left = [status for status in found if status.state not in ENDED and (status.handle or searching)]
        line = f"{len(found) - len(left)} of {len(found)} have ended" + "".join(
            f"; {status.directory.name} {status.state} at {status.tokens:,} tokens" for status in left[:4]
        )
        if line != before:
            print(line, flush=True)
            before = line
        if not left and not searching:
            break
        time.sleep(POLL_S)
    if search.exists:
        print(in_words(search))
        if (state := search.state()) is None or not state.ended:
            return TryAgain.exit_code
    bad = [status for status in found if status.state not in ("finished", "pruned")]
    for status in bad:
        print(f"{status.directory} {status.state}: {status.job.reason}", file=sys.stderr)
    return RunFailed.exit_code if bad else 0
