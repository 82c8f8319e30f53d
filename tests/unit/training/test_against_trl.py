"""DPO equals TRL's `DPOTrainer` step by step: its own tokenised columns, the same order, AdamW, decay and clipping.

TRL pads a whole step; here the same step is cut into micro-batches.
"""

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import fit, gradients_of, in_fp64, largest_difference
from torch import Tensor

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DPOTrainer
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.tokenizer import load_tokenizer, train_bpe
from llmtrain.models.build import build
from llmtrain.training import module as module_file
from llmtrain.training.batches import PairSteps
from llmtrain.training.evaluation import score_pairs
from llmtrain.training.module import DirectPreference

WORDS = "the old grey cat sat by a warm stone wall and the young dog slept under one tall green tree".split()  # noqa: SIM905
GRADIENT_TOLERANCE = {"fp32": 1e-5, "fp64": 1e-9}


class ExactLogProbs:
    """What TRL's chunked kernel computes, in the precision of the model: the kernel rounds to fp32."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: None, labels: Tensor, *settings: object) -> tuple:
        from trl.trainer.utils import selective_log_softmax

        logits = hidden @ weight.T
        log_probs = selective_log_softmax(logits, labels)
        not_compared = torch.zeros_like(log_probs)
        return log_probs, not_compared, None, not_compared, logits.argmax(-1) == labels


@pytest.fixture(scope="session")
def recording_trainer() -> type:
    """TRL's trainer, which keeps the loss of each step and the gradients that its optimizer is given."""
    import trl
    from transformers import TrainerCallback

    class GradientRecorder(TrainerCallback):
        def __init__(self, gradients: list[dict[str, Tensor]]) -> None:
            self.gradients = gradients

        def on_pre_optimizer_step(self, args, state, control, *, model, **others) -> None:
            self.gradients.append(gradients_of(model))

    class RecordingTrainer(trl.DPOTrainer):
        def __init__(self, **arguments: Any) -> None:
            self.losses: list[float] = []
            self.gradients: list[dict[str, Tensor]] = []
            super().__init__(**arguments)
            self.add_callback(GradientRecorder(self.gradients))

        def compute_loss(self, *arguments: Any, **options: Any) -> Tensor:
            loss = super().compute_loss(*arguments, **options)
            self.losses.append(loss.item())
            return loss

    return RecordingTrainer


def settings_of(trainer: DPOTrainer) -> dict[str, Any]:
    """`trainer` in TRL's terms, on the CPU, with nothing left to its defaults that would compute something else."""
    return {
        "per_device_train_batch_size": trainer.batch_rows,
        "num_train_epochs": 1,  # the rows of all epochs are given in their order
        "train_sampling_strategy": "sequential",
        "beta": trainer.beta,
        "learning_rate": trainer.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": trainer.weight_decay,
        "adam_beta1": trainer.adam_beta1,
        "adam_beta2": trainer.adam_beta2,
        "adam_epsilon": trainer.adam_eps,
        "max_grad_norm": trainer.max_grad_norm,
        "seed": trainer.seed,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def written(columns: Any, directory: Path) -> PreferencePairs:
    """TRL's columns as our files."""
    writer = PairWriter(directory, "train", np.dtype("<u4"))
    for row in columns:
        ids = (np.array(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        writer.append(Pair(*ids), PairText("", "", "", ""))
    writer.close()
    return PreferencePairs(directory, "train")


@pytest.fixture
def assert_equal_to_trl(recording_trainer, tmp_path: Path, monkeypatch):
    from datasets import Dataset
    from trl import DPOConfig

    def compare(config: TrainConfig, tokenizer: Any, rows: list[dict[str, Any]], precision: str) -> None:
        assert isinstance(config.trainer, DPOTrainer)
        torch.manual_seed(config.trainer.seed)
        network = build(config.model)
        if precision == "fp64":
            network = in_fp64(network)
            monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactLogProbs)

        theirs = recording_trainer(
            model=copy.deepcopy(network),
            ref_model=copy.deepcopy(network),
            args=DPOConfig(output_dir=str(tmp_path), **settings_of(config.trainer)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        pairs = written(theirs.train_dataset, tmp_path)
        reference = score_pairs(network, pairs, list(range(len(pairs))), config.infra)
        steps = PairSteps(pairs, reference, config.trainer, config.infra.micro_batch_tokens)
        theirs.train_dataset = theirs.train_dataset.select(steps.order)
        theirs.train()

        module = DirectPreference(network, config.trainer, config.infra, total_tokens=steps.tokens_before(len(steps)))
        margins: dict[int, list[Tensor]] = defaultdict(list)
        honest = module_file.dpo_sigmoid

        def observed(*arguments):
            found = honest(*arguments)
            margins[module.step].append(found.margins.detach())
            return found

        monkeypatch.setattr(module_file, "dpo_sigmoid", observed)
        ours = fit(module, steps)

        assert len(ours.losses) == len(theirs.losses) == len(steps) >= 5
        assert max(len(step) for step in margins.values()) >= 2, "no step was cut into micro-batches"
        for step in range(len(steps)):
            logged = theirs.state.log_history[step]
            margin = torch.cat(margins[step]).mean().item()
            assert ours.losses[step] == pytest.approx(theirs.losses[step], rel=1e-5, abs=1e-5)
            assert margin == pytest.approx(logged["rewards/margins"], rel=1e-5, abs=1e-5)
            assert ours.gradient_norms[step] == pytest.approx(logged["grad_norm"], rel=1e-5)
            assert largest_difference(ours.gradients[step], theirs.gradients[step]) <= GRADIENT_TOLERANCE[precision]
        assert min(ours.gradient_norms) < config.trainer.max_grad_norm < max(ours.gradient_norms)
        assert abs(margin) > 0.05, "the policy never left its reference"

    return compare


def overrides(**changes: object) -> list[str]:
    """A constant learning rate, and decay that matters."""
    values = {
        "trainer.lr": 1e-3,
        "trainer.min_lr_share": 1.0,
        "trainer.warmup_tokens": 0,
        "trainer.weight_decay": 0.1,
        "trainer.epochs": 2,
        "infra.precision": "fp32",
        **changes,
    }
    return ["model=qwen3_tiny", "trainer=dpo", *(f"{name}={value}" for name, value in values.items())]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_dpo_equals_trl_on_plain_pairs_of_unequal_lengths(assert_equal_to_trl, tmp_path, precision):
    train_bpe([" ".join(WORDS)], 310, tmp_path)
    random = np.random.default_rng(0)

    def text() -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, 15)))

    rows = [{"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(13)]
    cuts = {"trainer.batch_rows": 4, "infra.micro_batch_tokens": 150, "infra.loss_chunk_tokens": 7}
    config = load_config(overrides(**{"trainer.max_grad_norm": 2.0}, **cuts))
    assert_equal_to_trl(config, load_tokenizer(tmp_path), rows, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_dpo_equals_trl_on_annotated_chats_with_the_official_tokenizer(assert_equal_to_trl, repository, precision):
    shared = repository.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("needs ../shared: the official Qwen3 tokenizer and PandaLM's pairs")
    with (shared / "preferences" / "pandalm_human_999_pairs.jsonl").open() as file:
        records = [json.loads(line) for line in file]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    shortest = sorted(records, key=lambda record: sum(len(record[name]) for name in roles))[:5]
    rows = [{name: [{"role": role, "content": record[name]}] for name, role in roles.items()} for record in shortest]
    sizes = {"vocab_size": 151_936, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    # no chunks of one to three tokens: in fp32 such a product sums 151,936 terms one after the other and loses a digit
    cuts = {"trainer.batch_rows": 2, "infra.micro_batch_tokens": 100, "infra.loss_chunk_tokens": 64}
    model = {f"model.{name}": size for name, size in sizes.items()}
    config = load_config(overrides(**{"trainer.max_grad_norm": 0.6}, **cuts, **model))
    assert_equal_to_trl(config, load_tokenizer(shared / "tokenizer-qwen3"), rows, precision)
