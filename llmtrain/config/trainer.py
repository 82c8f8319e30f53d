"""`trainer=`: what is optimised and by which schedule. Tokens are the clock."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Discriminator, model_validator

from llmtrain.config.base import Added, Changes, NameOf, Settings


class _Trainer(Settings):
    seed: Annotated[int, Ge(0), Changes.MATHEMATICS]
    """Seeds the initial weights, the order of the data and dropout."""
    sequence_tokens: Annotated[int, Gt(1), Changes.MATHEMATICS]
    """Tokens in a row of text or of packed chats; the longest prompt and answer together in preference tuning."""
    batch_rows: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Rows, or pairs in preference tuning, in one optimizer step, over all ranks and micro-batches."""
    lr: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Peak learning rate, reached after the warm-up."""
    min_lr_share: Annotated[float, Ge(0), Le(1), Changes.MATHEMATICS]
    """What is left of `lr` at the end of the schedule."""
    warmup_tokens: Annotated[int, Ge(0), Changes.MATHEMATICS]
    """Tokens over which the learning rate rises linearly from zero."""
    schedule: Annotated[Literal["cosine", "wsd", "constant"], Changes.MATHEMATICS, Added(3, "cosine")]
    """After the warm-up: `cosine` falls over the whole run; `wsd` stays at `lr` and falls linearly over the last
    `decay_share` of it (arXiv 2404.06395); `constant` does not fall."""
    decay_share: Annotated[float, Gt(0), Le(1), Changes.MATHEMATICS, Added(3, 0.2)]
    """Share of the run's tokens over which `schedule=wsd` falls at the end; the others do not use it."""
    optimizer: Annotated[Literal["adamw", "muon", "adamw_8bit"], Changes.MATHEMATICS, Added(3, "adamw")]
    """`adamw`; `muon` for the blocks' matrices with AdamW for the rest, refused with an adapter; `adamw_8bit`: moments
    in eight bits (CUDA)."""
    muon_momentum: Annotated[float, Ge(0), Lt(1), Changes.MATHEMATICS, Added(3, 0.95)]
    """Decay of Muon's running gradient; only `optimizer=muon` uses it."""
    weight_decay: Annotated[float, Ge(0), Changes.MATHEMATICS]
    """AdamW's decoupled decay, for matrices only (no norms, no biases)."""
    adam_beta1: Annotated[float, Ge(0), Lt(1), Changes.MATHEMATICS]
    """Decay of the gradient's running mean."""
    adam_beta2: Annotated[float, Ge(0), Lt(1), Changes.MATHEMATICS]
    """Decay of the squared gradient's running mean."""
    adam_eps: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Added to the denominator."""
    max_grad_norm: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """The global gradient norm is clipped to this."""
    log_every_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Tokens between two rows of metrics."""
    evaluate_every_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Tokens between two evaluations on the validation split."""
    checkpoint_every_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Tokens between two checkpoints: what a crash can cost at most."""
    sample_tokens: Annotated[int, Ge(0), Changes.SURFACE, Added(2, 0)]
    """Tokens by which a few held-out prompts are continued at each evaluation, for the report; 0 for none."""


class _OnText(_Trainer):
    budget_tokens: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Tokens to train on, rounded down to whole steps; the corpus is repeated, reshuffled, when it is shorter."""

    @model_validator(mode="after")
    def one_step_fits(self) -> "_OnText":
        step_tokens = self.batch_rows * self.sequence_tokens
        if self.budget_tokens < step_tokens:
            raise ValueError(
                f"budget_tokens={self.budget_tokens} is less than one step of batch_rows * sequence_tokens = "
                f"{step_tokens} tokens; raise trainer.budget_tokens or lower trainer.batch_rows"
            )
        if self.warmup_tokens >= self.budget_tokens:
            raise ValueError(
                f"warmup_tokens={self.warmup_tokens} leaves nothing of budget_tokens={self.budget_tokens}; "
                f"set trainer.warmup_tokens below it"
            )
        return self


class PretrainTrainer(_OnText):
    """Next-token cross-entropy over rows of the corpus."""

    kind: Annotated[Literal["pretrain"], Changes.MATHEMATICS]
    packing: Annotated[Literal["stream", "documents"], Changes.MATHEMATICS, Added(3, "stream")]
    """`stream` cuts the corpus, end to end, into rows of `sequence_tokens`, within which attention sees everything
    before; `documents` packs whole documents (longer ones in pieces) by best fit, each seeing only itself, positions
    restarted; a step's tokens then vary a little, because rows are not all full."""


class DistillTrainer(_OnText):
    """Learning a teacher's distribution over the next token (arXiv 1503.02531; reverse KL: arXiv 2306.08543)."""

    kind: Annotated[Literal["distill"], Changes.MATHEMATICS]
    init_from: Annotated[str, Changes.SURFACE, NameOf(Changes.MATHEMATICS)]
    """What the student starts from: `scratch` (fresh weights; a published model's own), a run's directory,
    `name@version`, or `latest` as for `trainer=dpo`."""
    teacher: Annotated[str, Changes.SURFACE, NameOf(Changes.MATHEMATICS)]
    """A model's directory, a run's directory, or `name@version`; it must share the student's tokenizer. The run id has
    the hash of its weights."""
    divergence: Annotated[Literal["forward", "reverse"], Changes.MATHEMATICS]
    """`forward`: KL(teacher || student), covers all that the teacher says; `reverse`: KL(student || teacher), keeps to
    what it says most."""
    temperature: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Both distributions are softened by it; the divergence is multiplied by its square, so that gradients keep their
    size."""
    teacher_top_k: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Entries of the teacher's distribution kept for each token, on disk; the rest counts as one entry."""
    ce_weight: Annotated[float, Ge(0), Le(1), Changes.MATHEMATICS]
    """Share of the usual cross-entropy in the loss; the divergence has the rest."""


class SFTTrainer(_Trainer):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens of chats."""

    kind: Annotated[Literal["sft"], Changes.MATHEMATICS]
    init_from: Annotated[str, Changes.SURFACE, NameOf(Changes.MATHEMATICS)]
    """The model to tune, as for `trainer=dpo`."""
    epochs: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Passes over the training chats; the last step may be smaller."""
    heldout_loss_warning_share: Annotated[float, Gt(0), Changes.SURFACE]
    """Rise of the held-out language loss, as a share of its value before, above which the run warns."""


class DPOTrainer(_Trainer):
    """Direct preference optimisation (arXiv 2305.18290) and its family."""

    kind: Annotated[Literal["dpo"], Changes.MATHEMATICS]
    init_from: Annotated[str, Changes.SURFACE, NameOf(Changes.MATHEMATICS)]
    """The model to tune, and the reference: a run's directory, `name@version`, or `latest` (a published model's own
    weights; otherwise the newest registered pretrained version of this shape with this tokenizer; where there is none,
    that pretraining runs first). The run id has the hash of its weights."""
    loss: Annotated[
        Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "apo_down"],
        Changes.MATHEMATICS,
        Added(3, "sigmoid"),
    ]
    """Which member of the family; llmtrain/training/preference_losses.py has each with its paper. `simpo` and `orpo`
    need no reference; `kto` judges single answers and takes `data=votes_jsonl` too."""
    beta: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """How strongly the policy is held to the reference: the implicit reward is beta times the log-ratio. `ipo`'s tau;
    `orpo`'s weight of the odds ratio."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5), Changes.MATHEMATICS, Added(3, 0.0)]
    """Share of pairs taken to be labelled the wrong way round: `sigmoid` (conservative DPO) and `robust` use it."""
    sft_weight: Annotated[float, Ge(0), Changes.MATHEMATICS, Added(3, 0.0)]
    """Weight of the cross-entropy of the chosen answers, added to the loss (RPO's term, arXiv 2404.19733)."""
    target_margin: Annotated[float, Ge(0), Changes.MATHEMATICS, Added(3, 0.5)]
    """Reward margin that `simpo` asks for (its gamma over beta); the others do not use it."""
    desirable_weight: Annotated[float, Gt(0), Changes.MATHEMATICS, Added(3, 1.0)]
    """Weight of `kto`'s desirable answers."""
    undesirable_weight: Annotated[float, Gt(0), Changes.MATHEMATICS, Added(3, 1.0)]
    """Weight of `kto`'s undesirable answers."""
    epochs: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Passes over the training pairs; the last step may be smaller."""
    heldout_loss_warning_share: Annotated[float, Gt(0), Changes.SURFACE]
    """Rise of the held-out language loss, as a share of its value before, above which the run warns."""

    @model_validator(mode="after")
    def loss_uses_its_terms(self) -> "DPOTrainer":
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no meaning for loss={self.loss}; "
                f"set trainer.label_smoothing=0, or trainer.loss=sigmoid or robust"
            )
        if self.sft_weight and self.loss == "orpo":
            raise ValueError(
                f"sft_weight={self.sft_weight} would count the chosen answers' cross-entropy twice: loss=orpo has it; "
                f"set trainer.sft_weight=0, and trainer.beta for the weight of orpo's other term"
            )
        return self


Trainer = Annotated[
    PretrainTrainer | SFTTrainer | DPOTrainer | DistillTrainer,
    Discriminator("kind"),
]
