"""How long the command line takes to answer: python bench/startup.py [RUNS]

Prints the median wall time of each command as a whole process, and its ratio to the imports that no answer can do
without. Aims: --help 0.25 s, --cfg job 0.7 s.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "import hydra, pydantic": ["-c", "import hydra, pydantic"],
    "--help": ["train.py", "--help"],
    "--cfg job": ["train.py", "--cfg", "job"],
    "a typo": ["train.py", "trainer.warmup_token=3"],
}


def main(num_runs: int) -> None:
    """Commands take turns, so that a busy moment hits all of them; the first round only warms the disk."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(num_runs + 1):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    floor = medians["import hydra, pydantic"]
    print(f"medians of {num_runs} runs")
    for name, median in medians.items():
        print(f"{name:24} {median:6.3f} s   {median / floor:5.2f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
