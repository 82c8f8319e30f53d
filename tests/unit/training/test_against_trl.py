"""Training equals TRL's trainers step by step: their own tokenised columns, the same order, AdamW, decay and clipping.

TRL pads a whole step and computes a prompt for each of its answers; here the same step is cut into packed
micro-batches, and a prompt is computed once.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Recorder, fit, gradients_of, in_fp64, largest_difference
from torch import Tensor
from transformers import PreTrainedModel

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DPOTrainer, SFTTrainer, Trainer
from llmtrain.data.chats import Chat, ChatRows, ChatText, ChatWriter
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.tokenizer import load_tokenizer, train_bpe
from llmtrain.models.attention import use
from llmtrain.models.build import build
from llmtrain.training import module as module_file
from llmtrain.training.batches import ChatSteps, PairSteps
from llmtrain.training.evaluation import score_pairs
from llmtrain.training.module import CrossEntropy, DirectPreference, Votes

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
def recording() -> Callable[[str], type]:
    """A trainer of TRL's by its name, which keeps each loss and the gradients that its optimizer is given."""
    import trl
    from transformers import TrainerCallback

    class GradientRecorder(TrainerCallback):
        def __init__(self, gradients: list[dict[str, Tensor]]) -> None:
            self.gradients = gradients

        def on_pre_optimizer_step(self, args, state, control, *, model, **others) -> None:
            self.gradients.append(gradients_of(model))

    def trainer(name: str) -> type:
        honest = getattr(trl, name)

        class RecordingTrainer(honest):
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

    return trainer


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """`trainer` in TRL's terms, on the CPU, with nothing left to its defaults that would compute something else."""
    return {
        "per_device_train_batch_size": trainer.batch_rows,
        "num_train_epochs": 1,  # the rows of all epochs are given in their order
        "train_sampling_strategy": "sequential",
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
def network_in(monkeypatch):
    """A fresh network in fp32 or fp64; TRL then computes in fp64 too."""

    def build_in(config: TrainConfig, precision: str) -> PreTrainedModel:
        torch.manual_seed(config.trainer.seed)
        network = build(config.model)
        if precision == "fp64":
            network = in_fp64(network)
            monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactLogProbs)
        use(network, "segments")
        return network

    return build_in


def plain(network: PreTrainedModel) -> PreTrainedModel:
    """A copy with transformers' own attention."""
    network = copy.deepcopy(network)
    network.set_attn_implementation("sdpa")
    return network


def assert_steps_equal(ours: Recorder, theirs: Any, losses: list[float], precision: str) -> None:
    """Each step's loss, gradients, and their norm before clipping."""
    assert len(ours.losses) == len(losses) == len(theirs.gradients)
    for step, loss in enumerate(losses):
        assert ours.losses[step] == pytest.approx(loss, rel=1e-5, abs=1e-5)
        assert ours.gradient_norms[step] == pytest.approx(theirs.state.log_history[step]["grad_norm"], rel=1e-5)
        assert largest_difference(ours.gradients[step], theirs.gradients[step]) <= GRADIENT_TOLERANCE[precision]


@pytest.fixture
def assert_equal_to_trl(recording, network_in, tmp_path: Path, monkeypatch):
    from datasets import Dataset
    from trl import DPOConfig

    def compare(
        config: TrainConfig, tokenizer: Any, rows: list[dict[str, Any]], precision: str, **loss: Any
    ) -> tuple[Recorder, float]:
        """What we recorded, and the last step's margin."""
        assert isinstance(config.trainer, DPOTrainer)
        network = network_in(config, precision)
        theirs = recording("DPOTrainer")(
            model=plain(network),
            ref_model=plain(network),
            args=DPOConfig(output_dir=str(tmp_path), beta=config.trainer.beta, **settings_of(config.trainer), **loss),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        pairs = written(theirs.train_dataset, tmp_path)
        reference = score_pairs(network, pairs, list(range(len(pairs))), config.infra)
        steps = PairSteps(pairs, reference, config.trainer, config.infra)
        theirs.train_dataset = theirs.train_dataset.select(steps.order)
        theirs.train()

        module = DirectPreference(network, config.trainer, config.infra, total_tokens=steps.tokens_before(len(steps)))
        margins: dict[int, list[Tensor]] = defaultdict(list)
        honest = module_file.preference_loss

        def observed(*arguments):
            found = honest(*arguments)
            margins[module.step].append(found.margins.detach())
            return found

        monkeypatch.setattr(module_file, "preference_loss", observed)
        ours = fit(module, steps)

        assert len(steps) >= 5
        assert max(len(steps[step].micro_batches) for step in range(len(steps))) >= 2, "no step was cut"
        assert_steps_equal(ours, theirs, theirs.losses, precision)
        for step in range(len(steps)):
            margin = torch.cat(margins[step]).mean().item()
            logged = theirs.state.log_history[step]["rewards/margins"]
            assert margin == pytest.approx(logged, rel=1e-5, abs=1e-5)
        return ours, margin

    return compare


def overrides(trainer: str = "dpo", **changes: object) -> list[str]:
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
    return ["model=qwen3_tiny", f"trainer={trainer}", *(f"{name}={value}" for name, value in values.items())]


CUTS = {"trainer.batch_rows": 4, "infra.micro_batch_tokens": 100, "infra.loss_chunk_tokens": 7}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe([" ".join(WORDS)], 310, directory)
    return load_tokenizer(directory)


def plain_pairs() -> list[dict[str, Any]]:
    """13 pairs of unequal lengths."""
    random = np.random.default_rng(0)

    def text() -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, 15)))

    return [{"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(13)]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_dpo_equals_trl_on_plain_pairs_of_unequal_lengths(assert_equal_to_trl, tokenizer, precision):
    config = load_config(overrides(**{"trainer.max_grad_norm": 2.0}, **CUTS))
    ours, margin = assert_equal_to_trl(config, tokenizer, plain_pairs(), precision)
    assert min(ours.gradient_norms) < config.trainer.max_grad_norm < max(ours.gradient_norms)
    assert abs(margin) > 0.05, "the policy never left its reference"


LOSSES = {
    "ipo": ({}, {"loss_type": ["ipo"]}),
    "hinge": ({}, {"loss_type": ["hinge"]}),
    "robust": ({"trainer.label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "apo_zero": ({}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({}, {"loss_type": ["apo_down"]}),
    "sigmoid": ({"trainer.sft_weight": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
}
"""Our settings, and TRL's."""


@pytest.mark.parametrize("loss", LOSSES)
def test_dpos_family_equals_trl(assert_equal_to_trl, tokenizer, loss):
    ours, theirs = LOSSES[loss]
    config = load_config(overrides(**{"trainer.loss": loss}, **ours, **CUTS))
    _, margin = assert_equal_to_trl(config, tokenizer, plain_pairs(), "fp64", **theirs)
    assert abs(margin) > 1e-3, "the policy never left its reference"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_kto_equals_trl_given_its_mismatched_answers(recording, network_in, tokenizer, tmp_path, precision):
    from datasets import Dataset
    from trl import KTOConfig

    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.3}
    config = load_config(overrides("kto", **{f"trainer.{name}": value for name, value in weights.items()}, **CUTS))
    assert isinstance(config.trainer, DPOTrainer)
    network = network_in(config, precision)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 3 != 0}
        for number, row in enumerate(plain_pairs())
    ]
    theirs = recording("KTOTrainer")(
        model=plain(network),
        ref_model=plain(network),
        args=KTOConfig(output_dir=str(tmp_path), beta=config.trainer.beta, **settings_of(config.trainer), **weights),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    writer = PairWriter(tmp_path, "votes", np.dtype("<u4"))
    for row in theirs.train_dataset:
        ids = (np.array(row[name]) for name in ("prompt_ids", "completion_ids", "KL_completion_ids"))
        writer.append(Pair(*ids), PairText("", "", "", ""), is_desirable=row["label"])
    writer.close()
    votes = PreferencePairs(tmp_path, "votes")
    reference = score_pairs(network, votes, list(range(len(votes))), config.infra)
    steps = PairSteps(votes, reference, config.trainer, config.infra)
    theirs.train_dataset = theirs.train_dataset.select(steps.order)
    theirs.train()
    ours = fit(Votes(network, config.trainer, config.infra, total_tokens=steps.tokens_before(len(steps))), steps)
    assert max(len(steps[step].micro_batches) for step in range(len(steps))) >= 2, "no step was cut"
    assert_steps_equal(ours, theirs, theirs.losses, precision)
    assert max(row.get("kl", 0) for row in theirs.state.log_history) > 0, "the baseline never left zero"


NUM_ROWS = 8
"""Rows of 120 tokens that hold the 13 chats."""


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_sft_equals_trl_over_accumulated_batches(recording, network_in, tokenizer, tmp_path, precision):
    """A step is all chats: ours packed into rows and cut, TRL's padded in batches of 5, 5 and 3."""
    import trl
    from datasets import Dataset

    sizes = {"trainer.batch_rows": NUM_ROWS, "trainer.sequence_tokens": 120, "trainer.epochs": 3}
    config = load_config(overrides("sft", **CUTS | sizes))
    assert isinstance(config.trainer, SFTTrainer)
    network = network_in(config, precision)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    rows = [
        {"messages": [{"role": role, "content": row[name]} for role, name in turns]}
        for row in plain_pairs()
        for turns in [[("user", "prompt"), ("assistant", "chosen"), ("user", "rejected"), ("assistant", "prompt")]]
    ]
    settings = settings_of(config.trainer) | {"per_device_train_batch_size": 5, "num_train_epochs": 3}
    theirs = recording("SFTTrainer")(
        model=plain(network),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), assistant_only_loss=True, gradient_accumulation_steps=3, **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs.train()
    writer = ChatWriter(tmp_path, "train", np.dtype("<u4"))
    for row in theirs.train_dataset:
        is_target = np.array(row["labels"]) != -100
        writer.append(Chat(np.array(row["input_ids"]), is_target), ChatText("", ""))
        assert 0 < is_target.sum() < len(is_target)
    writer.close()
    steps = ChatSteps(ChatRows(tmp_path, "train"), config.trainer, config.infra)
    assert len(steps.rows) == NUM_ROWS, "a step is not an epoch"
    assert len(steps[0].micro_batches) >= 2, "no step was cut"
    ours = fit(CrossEntropy(network, config.trainer, config.infra, total_tokens=steps.tokens_before(3)), steps)
    losses = [sum(theirs.losses[first : first + 3]) for first in (0, 3, 6)]
    assert_steps_equal(ours, theirs, losses, precision)


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
    cuts = {"trainer.batch_rows": 2, "infra.micro_batch_tokens": 60, "infra.loss_chunk_tokens": 64}
    model = {f"model.{name}": size for name, size in sizes.items()}
    config = load_config(overrides(**{"trainer.max_grad_norm": 0.6}, **cuts, **model))
    ours, margin = assert_equal_to_trl(config, load_tokenizer(shared / "tokenizer-qwen3"), rows, precision)
    assert min(ours.gradient_norms) < config.trainer.max_grad_norm < max(ours.gradient_norms)
    assert abs(margin) > 0.05, "the policy never left its reference"
