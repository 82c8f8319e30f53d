"""`trainer=`: what is optimised and by which schedule. Tokens are the clock."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Discriminator, model_validator

from llmtrain.config.base import Changes, Settings


class _Trainer(Settings):
    seed: Annotated[int, Ge(0), Changes.MATHEMATICS]
    """Seeds the initial weights, the order of the data and dropout."""
    sequence_tokens: Annotated[int, Gt(1), Changes.MATHEMATICS]
    """Tokens in a pretraining row; the longest prompt and answer together in DPO."""
    batch_rows: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Rows (pretraining) or pairs (DPO) in one optimizer step, over all ranks and micro-batches."""
    lr: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Peak learning rate, reached after the warm-up."""
    min_lr_share: Annotated[float, Ge(0), Le(1), Changes.MATHEMATICS]
    """What is left of `lr` at the end of the cosine."""
    warmup_tokens: Annotated[int, Ge(0), Changes.MATHEMATICS]
    """Tokens over which the learning rate rises linearly from zero."""
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
    sample_tokens: Annotated[int, Ge(0), Changes.SURFACE]
    """Tokens by which a few held-out prompts are continued at each evaluation, for the report; 0 for none."""


class PretrainTrainer(_Trainer):
    """Next-token cross-entropy over rows of the corpus."""

    kind: Annotated[Literal["pretrain"], Changes.MATHEMATICS]
    budget_tokens: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Tokens to train on, rounded down to whole steps; the corpus is repeated, reshuffled, when it is shorter."""

    @model_validator(mode="after")
    def one_step_fits(self) -> "PretrainTrainer":
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


class DPOTrainer(_Trainer):
    """Direct preference optimisation with the sigmoid loss (arXiv 2305.18290, equation 7)."""

    kind: Annotated[Literal["dpo"], Changes.MATHEMATICS]
    init_from: Annotated[str, Changes.SURFACE]
    """The model to tune, and the reference: a run's directory, `name@version`, or `latest` (the newest registered
    pretrained version of this shape with this tokenizer; where there is none, that pretraining runs first). The run id
    has the hash of its weights."""
    beta: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """How strongly the policy is held to the reference: the implicit reward is beta times the log-ratio."""
    epochs: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Passes over the training pairs; the last step may be smaller."""
    heldout_loss_warning_share: Annotated[float, Gt(0), Changes.SURFACE]
    """Rise of the held-out language loss, as a share of its value before, above which the run warns."""


Trainer = Annotated[PretrainTrainer | DPOTrainer, Discriminator("kind")]
