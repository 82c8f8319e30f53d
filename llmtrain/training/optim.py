"""The optimizer."""

from torch import nn, optim

from llmtrain.config.trainer import Trainer


def adamw(model: nn.Module, trainer: Trainer) -> optim.AdamW:
    """AdamW (arXiv 1711.05101); weight decay on matrices and embeddings, none on vectors (norms)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": trainer.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optim.AdamW(
        groups, lr=trainer.lr, betas=(trainer.adam_beta1, trainer.adam_beta2), eps=trainer.adam_eps, fused=True
    )
