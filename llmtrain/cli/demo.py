"""`llmtrain demo`: pretrain, tune, register, compare, export, serve, check that it is the same model, and ask it."""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.cli.train import base_of
from llmtrain.config.compose import load_config
from llmtrain.errors import RunFailed
from llmtrain.processes import importable

if TYPE_CHECKING:
    from llmtrain.artifacts import TrainedModel

NUM_SAMPLES = 3
PROBES = 32
QUESTION = "The import statement"
STOP_SECONDS = 60


def main(argv: list[str]) -> int:
    """Exit code 3 where training did not beat its baselines: held-out loss a unigram model's, preference accuracy the
    better of the base model's log-probabilities, the longer answer, and a coin, by more than its standard error."""
    parser = argparse.ArgumentParser(prog="llmtrain demo", description=__doc__)
    parser.add_argument("--outputs", default="outputs", help="where runs and prepared data go")
    parser.add_argument("overrides", nargs="*", help="further overrides for both runs, such as trainer.seed=1")
    parser.add_argument("--vllm", action="store_true", help="serve by vLLM, in an environment of its own")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    base = _train([f"outputs_dir={arguments.outputs}", *arguments.overrides])
    tuned = _train([f"outputs_dir={arguments.outputs}", "trainer=dpo", *arguments.overrides])
    outputs = Path(arguments.outputs)
    _print_samples(outputs, base, tuned)
    _print_figures(base, tuned)
    _demand_progress(base, tuned)
    _serve(_label(outputs, tuned), arguments.outputs, by_vllm=arguments.vllm)
    print(f"\ndone in {time.monotonic() - started:.0f} s")
    for model in (base, tuned):
        print(f"  {(outputs / model.path).parent}: report.html, curves.png, metrics.jsonl, model/")
    print("  llmtrain models: the registered versions as a tree")
    print(f"  MLflow: mlflow server --backend-store-uri sqlite:///{outputs}/mlflow/mlflow.db "
          f"--artifacts-destination {outputs}/mlflow/artifacts")  # fmt: skip
    return 0


def _train(overrides: list[str]) -> "TrainedModel":
    print(f"\n$ python train.py {' '.join(overrides)}", flush=True)
    config = load_config(overrides)
    from llmtrain.training.run import train

    return train(config, base_config=base_of(config, [], "train"))


def _print_samples(outputs: Path, base: "TrainedModel", tuned: "TrainedModel") -> None:
    """Continuations of held-out prompts by both models, drawn with the same random numbers."""
    import torch
    from transformers import AutoTokenizer

    from llmtrain.config.frozen import thaw
    from llmtrain.data.preferences import PreferencePairs
    from llmtrain.models.directory import load

    pairs_path = thaw(outputs / tuned.path / ".." / "config.json").resolved.pairs_path
    assert pairs_path is not None
    pairs = PreferencePairs(outputs / pairs_path, "test")
    tokenizer = AutoTokenizer.from_pretrained(outputs / base.path)
    models = {"before DPO": load(outputs / base.path), "after DPO": load(outputs / tuned.path)}
    for index in range(NUM_SAMPLES):
        prompt = torch.from_numpy(pairs[index].prompt_ids.astype("int64"))[None]
        print(f"\n--- held-out prompt: ...{tokenizer.decode(prompt[0, -40:])!r}")
        for label, model in models.items():
            torch.manual_seed(index)
            written = model.generate(
                prompt, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=50, use_cache=True
            )
            print(f"  {label}: {tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)!r}")


def _print_figures(base: "TrainedModel", tuned: "TrainedModel") -> None:
    before, after = base.metrics, tuned.metrics
    rows = [
        ("held-out loss, nats per token", before["unigram/loss"],
         after["base/heldout_loss"], after["test/heldout_loss"]),
        ("held-out loss, bits per byte", before["unigram/bits_per_byte"], after["base/heldout_bits_per_byte"],
         after["test/heldout_bits_per_byte"]),
        ("preference accuracy", after["longer/accuracy"], after["base/accuracy"], after["test/accuracy"]),
        ("  its standard error", float("nan"), after["base/accuracy_se"], after["test/accuracy_se"]),
        ("chosen log-probability, change in nats", float("nan"), 0.0, after["test/chosen_logp_change"]),
    ]  # fmt: skip
    print(f"\n{'on the test split':40}{'baseline':>12}{'before DPO':>12}{'after DPO':>12}")
    for name, *values in rows:
        print(f"{name:40}" + "".join(f"{'' if value != value else format(value, '.3f'):>12}" for value in values))
    print("baselines: a unigram model; the longer answer; before DPO, accuracy by the base model's log-probabilities")


def _demand_progress(base: "TrainedModel", tuned: "TrainedModel") -> None:
    before, after = base.metrics, tuned.metrics
    if before["test/loss"] >= before["unigram/loss"]:
        raise RunFailed(
            f"the held-out loss {before['test/loss']:.3f} does not beat a unigram model's "
            f"{before['unigram/loss']:.3f}; raise trainer.budget_tokens"
        )
    baseline = max(after["base/accuracy"], after["longer/accuracy"], 0.5)
    if after["test/accuracy"] - baseline <= after["test/accuracy_se"]:
        raise RunFailed(
            f"the preference accuracy {after['test/accuracy']:.3f} ± {after['test/accuracy_se']:.3f} does not beat its "
            f"baseline {baseline:.3f} by more than its standard error; raise trainer.epochs or trainer.lr"
        )


def _label(outputs: Path, model: "TrainedModel") -> str:
    """What the registry calls it."""
    from llmtrain.artifacts import ModelVersion

    return ModelVersion.read(outputs / model.path / ".." / "version.json").label


def _serve(version: str, outputs: str, *, by_vllm: bool) -> None:
    """Export, serve, gate, ask: the commands that a person would type, each as a process of its own."""
    where = [f"version={version}", f"outputs_dir={outputs}"]
    if by_vllm:
        engine = ["serving=vllm"]
    else:
        engine = ["serving=onnx", "serving.form=onnx_fp32"]
        _do("optimise", *where, "optimise=onnx_fp32", "optimise.rounds=1", "optimise.batch_sizes=[1]")
    with _endpoint(*where, *engine, "serving.port=0") as url:
        _do("parity", where[0], "--outputs", outputs, "--url", url, "--probes", str(PROBES))
        from llmtrain.client.client import Client, Sampling

        sampling = Sampling(max_tokens=48, temperature=0.7, top_k=50, seed=0)
        with Client(url) as client:
            body = json.dumps({"model": client.served(), "prompt": QUESTION, **sampling.fields()})
            print(f"\n$ curl {url}/v1/completions -H 'content-type: application/json' -d '{body}'", flush=True)
            (answer,) = client.complete(QUESTION, sampling)
        print(f"  {QUESTION + answer.text!r}")


def _do(*words: str) -> None:
    """A command of llmtrain, shown and run. Raises RunFailed where it does not end well."""
    print(f"\n$ llmtrain {shlex.join(words)}", flush=True)
    with importable():
        code = subprocess.run([sys.executable, "-m", "llmtrain", *words], check=False).returncode
    if code:
        raise RunFailed(f"llmtrain {words[0]} ended with exit code {code}; what it says is above")


@contextmanager
def _endpoint(*overrides: str) -> Iterator[str]:
    """The URL of a server that runs while the block does. Raises RunFailed where it does not become ready."""
    print(f"\n$ python serve.py {shlex.join(overrides)}", flush=True)
    command = [sys.executable, "-m", "llmtrain", "serve", *overrides]
    with importable(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None, "a pipe was asked for"
            for line in server.stdout:
                print(line, end="", flush=True)
                if found := re.search(r"http://\S+:\d+", line):
                    yield found[0]
                    break
            else:
                raise RunFailed(f"the server ended with exit code {server.wait()} before it was ready")
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
