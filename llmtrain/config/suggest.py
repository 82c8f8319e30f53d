"""What the user probably meant: the nearest known name."""

from collections.abc import Iterable

ELSEWHERE = {
    "learning_rate": ["trainer.lr"],
    "steps": ["trainer.budget_tokens", "trainer.epochs"],
    "max_steps": ["trainer.budget_tokens", "trainer.epochs"],
    "num_epochs": ["trainer.epochs"],
    "num_train_epochs": ["trainer.epochs"],
    "batch_size": ["trainer.batch_rows", "infra.micro_batch_tokens"],
    "per_device_train_batch_size": ["trainer.batch_rows", "infra.micro_batch_tokens"],
    "gradient_accumulation_steps": ["trainer.batch_rows", "infra.micro_batch_tokens"],
    "max_length": ["trainer.sequence_tokens"],
    "max_seq_length": ["trainer.sequence_tokens"],
    "sequence_len": ["trainer.sequence_tokens"],
    "warmup_steps": ["trainer.warmup_tokens"],
    "warmup_ratio": ["trainer.warmup_tokens"],
    "lr_scheduler_type": ["trainer.schedule"],
    "max_norm": ["trainer.max_grad_norm"],
    "gradient_clipping": ["trainer.max_grad_norm"],
    "logging_steps": ["trainer.log_every_tokens"],
    "eval_steps": ["trainer.evaluate_every_tokens"],
    "save_steps": ["trainer.checkpoint_every_tokens"],
    "loss_type": ["trainer.loss"],
    "rpo_alpha": ["trainer.sft_weight"],
    "simpo_gamma": ["trainer.target_margin"],
    "gradient_checkpointing": ["infra.activation_checkpointing"],
    "attn_implementation": ["infra.attention"],
    "use_liger_kernel": ["infra.loss_kernel"],
    "torch_compile": ["infra.compile"],
    "num_processes": ["infra.ranks"],
    "devices": ["infra.ranks"],
    "bf16": ["infra.precision"],
    "fp16": ["infra.precision"],
    "r": ["adapter.rank"],
    "lora_r": ["adapter.rank"],
    "lora_alpha": ["adapter.alpha"],
    "lora_dropout": ["adapter.dropout"],
    "target_modules": ["adapter.targets"],
    "use_rslora": ["adapter.rslora"],
    "use_dora": ["adapter.dora"],
    "model_name_or_path": ["model.path"],
    "report_to": ["tracking.kind"],
}
"""What transformers, TRL, peft, accelerate and axolotl call a setting, and where that is set here; units differ too."""


def distance(first: str, second: str) -> int:
    """Letters dropped, added, replaced, or swapped with their neighbour, between two words.

    Optimal string alignment: Damerau-Levenshtein without editing a swapped pair again.
    """
    before: list[int] = []
    above = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == second[j - 2] and other == first[i - 2]:
                row[j] = min(row[j], before[j - 2] + 1)
        before, above = above, row
    return above[-1]


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The names that `word` was probably meant to be, several where they are equally near, none where all are far.

    Whole dotted names are compared first, then their last parts (`model.lr` and `lr` find `trainer.lr`), then parts of
    the last parts (`trainer.warmup` finds `trainer.warmup_tokens`). Names of `ELSEWHERE` come before all these.
    """
    known = list(known)
    if other := [name for name in ELSEWHERE.get(word.rpartition(".")[2], []) if name in known]:
        return other
    whole = {name: name for name in known}
    last = {name: name.rpartition(".")[2] for name in whole}
    end = word.rpartition(".")[2]
    return _nearest(word, whole) or _nearest(end, last) or [name for name in last if len(end) > 2 and end in last[name]]


def _nearest(word: str, spelled: dict[str, str]) -> list[str]:
    """The names whose spelling is the fewest edits away from `word`, if that is at most a quarter of its letters."""
    limit = max(1, len(word) // 4)
    near = {name: spelling for name, spelling in spelled.items() if abs(len(spelling) - len(word)) <= limit}
    distances = {name: distance(word, spelling) for name, spelling in near.items()}
    least = min(distances.values(), default=limit + 1)
    return [name for name in distances if distances[name] == least] if least <= limit else []


def where_listed(name: str, known: Iterable[str]) -> str:
    """`; llmtrain explain GROUP lists what there is`, where the group that `name` is in has settings among `known`."""
    group = name.partition(".")[0]
    if any(other.startswith(f"{group}.") for other in known):
        return f"; llmtrain explain {group} lists what there is"
    return "; llmtrain explain lists them all"


def did_you_mean(names: list[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or nothing where there is no guess."""
    return f"; did you mean {' or '.join(repr(name) for name in names[:3])}?" if names else ""
