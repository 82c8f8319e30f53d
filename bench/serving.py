"""LitServe against a FastAPI loop around transformers' generate: python bench/serving.py MODEL_DIRECTORY
[--json FILE] [--concurrent 1 4 8 16 32] [--start ...] [...]

Both stand side by side and answer in turn the same streams: so many at once, one after another in each. Requests a
second and time to the first token; medians over rounds, ratios of each round. Aim: no slower than the loop for one
client, and faster for several, which it answers one after the other. `--start KEY=VALUE,...` (several) times from start
to first token of other endpoints: --start serving=onnx serving=vllm
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peers import save, table
from vllm import Seen, Server, load, row, stream, supervised  # bench/vllm.py

from llmtrain.serving.litserve_server import closing_socket

PEER = Path(__file__).with_name("fastapi_peer.py")
WARM_UP = {"model": "bench", "prompt": [5, 6], "max_tokens": 1, "stream": True}


@contextmanager
def fastapi_loop(model: Path, threads: int, place: Path) -> Iterator[Server]:
    """It, once it answers."""
    begin = time.perf_counter()
    with closing_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with (place / "peer.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(PEER), str(model), str(port), str(threads)], stdout=log, stderr=log
        )
    try:
        while True:
            try:
                asyncio.run(stream(port, WARM_UP))
                break
            except (OSError, AssertionError):
                assert process.poll() is None, (place / "peer.log").read_text()[-3000:]
                time.sleep(0.1)
        yield Server(port, process.pid, time.perf_counter() - begin)
    finally:
        process.terminate()
        process.wait()


def start_to_first_token(overrides: list[str], place: Path) -> float:
    """Seconds, of a process that nobody has started before on this machine's warm disk."""
    with supervised(overrides, place) as server:
        begun, first, *_ = asyncio.run(stream(server.port, WARM_UP))
        return server.start_s + first - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--concurrent", type=int, nargs="*", default=[1, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=4, help="of a round, at least as many as are concurrent")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", nargs="*", default=[], metavar="KEY=VALUE,...")
    chosen = parser.parse_args()
    chosen.vocabulary = json.loads((chosen.model / "config.json").read_text())["vocab_size"]
    fixed = [
        f"run={chosen.model.resolve()}", "serving.port=0", "serving.name=bench", "tracking=none",
        f"infra.threads={chosen.threads}",
    ]  # fmt: skip
    seen: dict[int, tuple[list[Seen], list[Seen]]] = {concurrent: ([], []) for concurrent in chosen.concurrent}
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if seen:
            most = f"serving.max_sequences={max(seen)}"
            with (
                supervised([*fixed, "serving=litserve", most], place) as our_server,
                fastapi_loop(chosen.model, chosen.threads, place) as their_server,
            ):
                for server in (our_server, their_server):  # warms up
                    asyncio.run(load(server, chosen, min(seen), 0))
                for number in range(1, chosen.rounds + 1):
                    for concurrent, (ours, theirs) in seen.items():
                        turns = [(our_server, ours), (their_server, theirs)]
                        for server, found in turns if number % 2 else reversed(turns):
                            found.append(asyncio.run(load(server, chosen, concurrent, number)))
                        shown = f"{ours[-1].requests_per_second:.3f} / {theirs[-1].requests_per_second:.3f} requests/s"
                        print(f"  round {number}, {concurrent} at once: {shown}", file=sys.stderr, flush=True)
            head = ["concurrent", "requests/s, ours / loop", "ratio (range)", "first token, ms", "between tokens, ms"]
            print(table([head, *(row(concurrent, *both) for concurrent, both in seen.items())]))
            results |= {
                f"serving {concurrent}": {"ours": [vars(one) for one in ours], "theirs": [vars(one) for one in theirs]}
                for concurrent, (ours, theirs) in seen.items()
            }
        for engine in chosen.start:
            times = [start_to_first_token([*fixed, *engine.split(",")], place) for _ in range(chosen.rounds)]
            results[f"start {engine}"] = times
            shown = " ".join(f"{seconds:.1f}" for seconds in sorted(times))
            print(f"start to first token, {engine}: {shown} s")
    save(chosen.json, results)


if __name__ == "__main__":
    main()
