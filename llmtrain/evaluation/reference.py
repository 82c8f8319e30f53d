"""Weights, scored in this process. The trained ones in fp32 are what all others are compared with."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtrain.client.client import Scores
from llmtrain.config.adapter import NoAdapter, QLoRAAdapter
from llmtrain.config.frozen import thaw
from llmtrain.models.adapter import attach, merge
from llmtrain.models.modes import evaluating
from llmtrain.models.start import starting_network
from llmtrain.serving.runtime import Runtime
from llmtrain.training import checkpoints

BATCH_TOKENS = 4096
"""Most tokens, padding included, that are computed at once; a longer row is computed alone."""
CHUNK_TOKENS = 512
"""Most rows of logits that exist at once: of 151,936 columns in fp32, 0.3 GB."""
MODULE_PREFIX = "model."
"""Of the network's parameters in a checkpoint."""


@torch.no_grad()
def scores(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Scores]:
    """What `model` thinks of each row of token ids, two at least; in its own precision, the log-softmax in fp32.

    Rows of near length are computed together, padded on the right, where causal attention does not look. Covers models
    with a plain output layer on the last hidden state, which are all that llmtrain trains (`check_log_probs`).
    """
    found: list[Scores | None] = [None] * len(rows)
    head = model.get_output_embeddings()
    with evaluating(model):
        for batch in _batches(rows):
            longest = max(len(rows[number]) for number in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for place, number in enumerate(batch):
                ids[place, : len(rows[number])] = torch.tensor(rows[number])
            ids = ids.to(model.device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for place, number in enumerate(batch):
                length = len(rows[number])
                found[number] = _scores(hidden[place, : length - 1], ids[place, 1:length], head)
    return [one for one in found if one is not None]


def runtime_scores(runtime: Runtime, rows: Sequence[Sequence[int]]) -> list[Scores]:
    """The same of a runtime of the servers, which is fed as they feed it."""
    found = []
    for ids in rows:
        own, top = [], []
        for start in range(0, len(ids) - 1, CHUNK_TOKENS):
            fed = ids[start : min(start + CHUNK_TOKENS, len(ids) - 1)]
            logits = np.asarray(runtime.feed(0, fed, "all"), dtype=np.float64)
            targets = np.asarray(ids[start + 1 : start + 1 + len(fed)])
            highest = logits.max(axis=1)
            norm = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
            own.append(logits[np.arange(len(fed)), targets] - norm)
            top.append(logits.argmax(axis=1))
        runtime.drop(0)
        found.append(Scores(tuple(np.concatenate(own).tolist()), tuple(np.concatenate(top).tolist())))
    return found


def last_checkpoint(run: Path, outputs: Path) -> PreTrainedModel | None:
    """The network of a finished run as its last checkpoint holds it, an adapter merged, fp32, on the CPU.

    None where the checkpoint of the last step is gone or damaged, or cannot be read by one process without CUDA
    (DeepSpeed's form, a base in 4 bits). Raises the errors of `llmtrain.errors` where the run's parent is gone.
    """
    path = checkpoints.newest(run / "checkpoints")
    clock = run / "clock.json"
    if path is None or not clock.exists() or checkpoints.step_of(path) != json.loads(clock.read_text())["steps"]:
        return None
    frozen = thaw(run / "config.json")
    config, parent = frozen.config, frozen.resolved.parent_path
    if isinstance(config.adapter, QLoRAAdapter) and not torch.cuda.is_available():
        return None
    state = checkpoints.AtomicCheckpoints().load_checkpoint(path)["state_dict"]
    if not state:
        return None
    network = starting_network(config, outputs / parent if parent else None)
    adapted = not isinstance(config.adapter, NoAdapter)
    if not isinstance(config.adapter, NoAdapter):
        attach(network, config.adapter)
    weights = {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in state.items()}
    network.load_state_dict(weights, strict=not adapted)  # or the adapter alone
    return merge(network) if adapted else network


def load_quantised(directory: Path) -> PreTrainedModel:
    """A form that torchao made, as transformers loads it: integers and bf16."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, as many as make at most BATCH_TOKENS with their padding, or one."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
        if batch and len(rows[batch[0]]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _scores(hidden: Tensor, targets: Tensor, head: nn.Module) -> Scores:
    own: list[NDArray[Any]] = []
    top: list[NDArray[Any]] = []
    for part, ids in zip(torch.split(hidden, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS), strict=True):
        logits = head(part).float()
        top.append(logits.argmax(dim=-1).cpu().numpy())
        own.append(logits.log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1).cpu().numpy())
    return Scores(tuple(np.concatenate(own).tolist()), tuple(np.concatenate(top).tolist()))
