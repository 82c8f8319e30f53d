"""What each figure of a run is held against, by the names that curves, table and verdict share."""

from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer, Trainer

UNIGRAM, BASE, TEACHER, REFERENCE = "a unigram model", "the base model", "the teacher", "policy = reference"
ACCURACIES = {
    "the longer answer": "longer/accuracy",
    "the commoner vote": "commoner/accuracy",
    BASE: "base/accuracy",
}


def levels(trainer: Trainer, baselines: dict[str, float]) -> dict[str, dict[str, float]]:
    """By metric: what its curve is drawn against, by name; what `baselines` (of the test split) lacks is left out."""
    known: dict[str, dict[str, float]] = {}
    match trainer:
        case PretrainTrainer():
            keys = {"loss": {UNIGRAM: "unigram/loss"}, "bits_per_byte": {UNIGRAM: "unigram/bits_per_byte"}}
        case DistillTrainer():
            heldout = {UNIGRAM: "unigram/heldout_loss", TEACHER: "teacher/heldout_loss"}
            keys = {"divergence": {UNIGRAM: "unigram/divergence"}, "heldout_loss": heldout}
        case SFTTrainer():
            keys = {"loss": {BASE: "base/loss"}, "heldout_loss": {BASE: "base/heldout_loss"}}
        case DPOTrainer():
            heldout = {BASE: "base/heldout_loss"}
            keys = {"loss": {REFERENCE: "base/loss"}, "margin": {BASE: "base/margin"}, "heldout_loss": heldout}
            known = {"accuracy": accuracy_baselines(baselines), "chosen_logp_change": {BASE: 0.0}, "kl_k3": {BASE: 0.0}}
    for metric, names in keys.items():
        known[metric] = {name: baselines[key] for name, key in names.items() if key in baselines}
    return {f"validation/{metric}": lines for metric, lines in known.items() if lines}


def accuracy_baselines(baselines: dict[str, float]) -> dict[str, float]:
    """What a preference accuracy has to beat, by name."""
    return {"a coin": 0.5} | {name: baselines[key] for name, key in ACCURACIES.items() if key in baselines}
