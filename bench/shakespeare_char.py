"""nanoGPT's example for a CPU, judged from outside: python bench/shakespeare_char.py TEXT [--seeds N] [OVERRIDE...]

Trains `experiment=shakespeare_char` on tiny Shakespeare as a user would, for seeds 0, 1, 2. The judge knows nothing of
llmtrain: transformers alone loads each exported directory, and the loss is the mean over the whole last tenth of the
text, cut where nanoGPT cuts it, in blocks of 64 characters that do not overlap: each character but the first is
predicted once. Published for nanoGPT's own model: 1.88 (1.886 where it was run again). Aim: a mean of at most 1.68.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
BLOCK = 64


def train(text: Path, seed: int, outputs: Path, overrides: list[str]) -> Path:
    """The directory of the model that the command exports."""
    command = ["experiment=shakespeare_char", f"data.corpus.paths=[{text}]", f"trainer.seed={seed}", "tracking=none"]
    command = [sys.executable, "train.py", *command, f"outputs_dir={outputs}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    (model,) = outputs.glob("shakespeare_char/*/model")
    return model


@torch.no_grad()
def judge(model_directory: Path, text: str) -> tuple[float, int]:
    """(loss in nats a character over the last tenth of `text`, parameters)."""
    heldout = text[int(0.9 * len(text)) :]
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    ids = torch.tensor(tokenizer(heldout, add_special_tokens=False, split_special_tokens=True).input_ids)
    assert len(ids) == len(heldout), "one token a character"
    assert tokenizer.decode(ids) == heldout, "the loss is over this text and no other"
    total = 0.0
    for start in range(0, len(ids) - 1, BLOCK):
        targets = ids[start + 1 : start + 1 + BLOCK]
        logits = model(input_ids=ids[None, start : start + len(targets)]).logits[0].double()
        total += cross_entropy(logits, targets, reduction="sum").item()
    return total / (len(ids) - 1), sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    text, losses = arguments.text.read_bytes().decode(), []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as outputs:
            started = time.perf_counter()
            model_directory = train(arguments.text.resolve(), seed, Path(outputs), overrides)
            seconds = time.perf_counter() - started
            loss, num_parameters = judge(model_directory, text)
        losses.append(loss)
        print(
            f"seed {seed}   loss {loss:.4f}   {num_parameters:,} parameters   {seconds:.0f} s, whole command",
            flush=True,
        )
    print(f"mean     loss {statistics.mean(losses):.4f}   over {len(losses)} seeds; nanoGPT 1.886, aim 1.68")


if __name__ == "__main__":
    main()
