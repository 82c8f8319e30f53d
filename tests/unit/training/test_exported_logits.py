"""A trained network and its exported directory give the same logits, bit for bit."""

import pytest
import torch
from oracles import fit
from transformers import AutoModelForCausalLM

from llmtrain.data.tokenizer import train_bpe
from llmtrain.models import directory
from llmtrain.models.build import build
from llmtrain.training.batches import TextSteps
from llmtrain.training.module import CrossEntropy


@torch.no_grad()
def logits(network, ids: torch.Tensor) -> torch.Tensor:
    return network(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_logits_after_training_survive_export_and_reload(shards, pretrain_config, tied, tmp_path):
    torch.manual_seed(0)
    network = build(pretrain_config.model.model_copy(update={"tie_word_embeddings": tied}))
    ids = torch.randint(network.config.vocab_size, (3, 40))
    untrained = logits(network, ids)
    trainer, infra = pretrain_config.trainer, pretrain_config.infra.model_copy(update={"micro_batch_tokens": 48})
    fit(CrossEntropy(network, trainer, infra, total_tokens=1_000), TextSteps(shards, trainer, 1_000, "stream", infra))
    trained = logits(network, ids)
    assert not torch.equal(trained, untrained)

    train_bpe(["the quick brown fox jumps over the lazy dog"], 300, tmp_path / "tokenizer")
    directory.save(network, tmp_path / "tokenizer", tmp_path / "model", card="")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    by_ours = directory.load(tmp_path / "model")
    for loaded in (by_transformers, by_ours):
        assert loaded.dtype == torch.float32
        assert torch.equal(logits(loaded, ids), trained)  # there is no dropout that would tell eval from train mode
        shared = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert shared == tied
