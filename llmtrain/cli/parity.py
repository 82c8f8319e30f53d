"""`llmtrain parity`: is what is served, or was made of a model, the model that was trained?"""

import json
import sys
from pathlib import Path
from typing import cast, get_args

from llmtrain.artifacts import Form
from llmtrain.cli import UsageError, exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.config.suggest import closest, did_you_mean

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--url", "judge what answers there; without it, the forms of the model on this machine", value="URL"),
    Flag("--probes", "the first N of the 256 probes", value="N"),
    Flag("--form", "which form answers at the URL, where several were served", value="FORM", choices=get_args(Form)),
    Flag("--context-tokens", "longest probe; else as long as the model or the endpoint has room for", value="N"),
    Flag("--device", "where the trained weights are computed (cpu)", value="DEVICE", choices=("cpu", "cuda")),
    Flag("--outputs", "outputs_dir of the runs (outputs)", value="DIR"),
    Flag("--json", "for machines: one object"),
]
USAGE = """llmtrain parity [FLAG] version=NAME@VERSION|run=DIRECTORY

Compares the tokens that 256 texts and chats become, and the log-probability of every one of them, with the trained
weights in fp32. Exit code 0: the same model, 3: not, with what differs. Evidence is written beside what was judged.
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Gate an endpoint, or what this machine has of a model."""
    flags, words = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    setting, _, name = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if setting not in ("version", "run") or not name:
        guess = did_you_mean(closest(setting, ("version", "run"))) if setting else ""
        raise UsageError(f"llmtrain parity wants one model, version=NAME@VERSION or run=outputs/NAME/RUN_ID{guess}")
    number, context = _whole(flags, "--probes") or 256, _whole(flags, "--context-tokens")
    outputs, url = Path(flags.get("--outputs", "outputs")), flags.get("--url")
    if "--form" in flags and url is None:
        raise UsageError("--form says what answers at a --url; without one, all forms are judged")

    from llmtrain.evaluation.gate import Asking, Device, gate_endpoint, gate_here
    from llmtrain.evaluation.parity import refuse, table
    from llmtrain.stored import named, registered

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    stored = registered(name, outputs) if setting == "version" else named(name, outputs, setting="run")
    asking = Asking(number, context, cast(Device, flags.get("--device", "cpu")))
    if url is None:
        verdicts = gate_here(stored, outputs, asking, say)
    else:
        verdicts = gate_endpoint(stored, outputs, url, flags.get("--form"), asking, say)
    if "--json" in flags:
        found = {one.party: one.evidence(()).figures | {"faults": one.faults} for one in verdicts}
        print(json.dumps({"model": stored.label, "parties": found}, indent=2, ensure_ascii=False))
    else:
        print(table(verdicts))
    refuse(verdicts)
    return 0


def _whole(flags: dict[str, str], name: str) -> int | None:
    """The whole number of a flag, 1 or more."""
    if name not in flags:
        return None
    if not flags[name].isdecimal() or int(flags[name]) < 1:
        raise UsageError(f"{name} wants a whole number from 1 on, not '{flags[name]}'")
    return int(flags[name])
