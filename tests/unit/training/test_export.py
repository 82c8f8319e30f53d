"""What the end of a run leaves, with and without an adapter."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmtrain.artifacts import Evidence, TrainedModel, weights_sha256
from llmtrain.config.adapter import NoAdapter
from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, recipe_sha256
from llmtrain.errors import IntegrityError
from llmtrain.models import directory as model_directory
from llmtrain.models.adapter import attach
from llmtrain.models.start import starting_network
from llmtrain.training import export as export_module
from llmtrain.training.export import export
from llmtrain.training.resolve import Inputs, resolve

IDS = (torch.arange(40) * 7919 % 400)[None]
FIGURES = {"test/loss": 2.5}


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the {number} lazy dogs run to the river {number * 7} " * 8)


def frozen_run(*overrides: str) -> tuple[FrozenRun, Inputs]:
    """Pretraining on a small corpus, under `outputs`."""
    files = "data.corpus={kind: files, paths: [text/*.txt], licence: MIT}"
    shares = ("data.validation_share=0.2", "data.test_share=0.2")
    line = ["data=text_files", files, *shares, "trainer.sequence_tokens=64", "infra.precision=fp32", *overrides]
    outputs = Path("outputs")

    def no_base() -> TrainedModel:
        raise AssertionError("nothing is to be trained")

    return resolve(load_config([*line, "tracking=none"]), outputs, no_base, lambda said: None)


@pytest.fixture
def published() -> str:
    _, inputs = frozen_run("model=qwen3_tiny", "model.vocab_size=400", "model.tokenizer.vocab_size=400")
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    network = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=80))
    model_directory.save(network, inputs.tokenizer_directory, Path("published"), card="")
    return "published"


def hf(path: str, *overrides: str) -> tuple[FrozenRun, Inputs]:
    return frozen_run("model=hf", f"model.path={path}", "model.name=published", *overrides)


def trained_network(frozen: FrozenRun, inputs: Inputs):
    """The starting network after something like training."""
    network = starting_network(frozen.config, inputs.parent.directory if inputs.parent else None)
    if not isinstance(frozen.config.adapter, NoAdapter):
        attach(network, frozen.config.adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return network


def exported(frozen: FrozenRun, inputs: Inputs, network) -> tuple[TrainedModel, Path]:
    run = Path("outputs") / "name" / frozen.run_id
    run.mkdir(parents=True)
    return export(frozen, network, inputs, Path("outputs"), run, FIGURES, num_tokens_seen=123), run


@torch.no_grad()
def logits(network):
    return network.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("adapter", ["adapter.dora=false", "adapter.dora=true"])
def test_an_adapter_is_left_merged_and_on_its_own(published: str, adapter: str):
    frozen, inputs = hf(published, "adapter=lora", adapter)
    network = trained_network(frozen, inputs)
    before = logits(network)
    trained, run = exported(frozen, inputs, network)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "model"))
    assert ((merged - before).norm() / before.norm()).item() <= 1e-5
    base = AutoModelForCausalLM.from_pretrained(published)
    assert torch.equal(logits(PeftModel.from_pretrained(base, run / "adapter")), before)
    told = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (run / "adapter" / told).resolve() == Path(published).resolve()
    assert trained.weights_sha256 == weights_sha256(run / "model") != frozen.resolved.parent_weights_sha256


def test_the_record_says_what_was_made_of_what(published: str):
    frozen, inputs = hf(published)
    trained, run = exported(frozen, inputs, trained_network(frozen, inputs))
    assert TrainedModel.read(run / "trained.json") == trained
    assert (trained.run_id, trained.trainer, trained.num_tokens_seen) == (frozen.run_id, "pretrain", 123)
    assert trained.parents == (inputs.text.sha256,)  # a published model has no record
    assert trained.shape_sha256 == inputs.shape_sha256
    assert Evidence.read(run / "evidence.json").parents == (trained.sha256,)
    assert not (run / "adapter").exists()
    again, _ = frozen_run("model=hf", f"model.path={run}/model", "model.name=again")
    assert again.resolved.parent_weights_sha256 == trained.weights_sha256


def test_a_recipe_is_the_trainers_the_adapters_and_the_published_weights(published: str, tmp_path: Path):
    def recipe(*overrides: str) -> str:
        frozen, inputs = frozen_run(*overrides)
        return exported(frozen, inputs, trained_network(frozen, inputs))[0].recipe_sha256

    scratch = ("model=qwen3_tiny", "model.vocab_size=400", "model.tokenizer.vocab_size=400")
    of_trainer = recipe_sha256(load_config([*scratch, "trainer.sequence_tokens=64"]).trainer)
    assert recipe(*scratch) == of_trainer == recipe(*scratch, "trainer.seed=1")
    model = ("model=hf", f"model.path={published}", "model.name=published")
    lora = recipe(*model, "adapter=lora")
    assert lora == recipe(*model, "adapter=lora", "trainer.seed=1")
    assert len({of_trainer, recipe(*model), lora, recipe(*model, "adapter=lora", "adapter.rank=8")}) == 4


def test_a_merge_that_computes_something_else_is_refused(published: str, monkeypatch: pytest.MonkeyPatch):
    frozen, inputs = hf(published, "adapter=lora")
    honest = export_module.merge

    def dishonest(model):
        honest(model)
        with torch.no_grad():
            model.model.norm.weight[0] *= 1.1

    monkeypatch.setattr(export_module, "merge", dishonest)
    with pytest.raises(IntegrityError, match="the merged model's logits differ"):
        exported(frozen, inputs, trained_network(frozen, inputs))
    assert not list(Path("outputs/name").rglob("trained.json"))


@pytest.mark.parametrize(
    ("overrides", "origin", "taught"),
    [
        (
            ["model=qwen3_tiny", "model.vocab_size=400", "model.tokenizer.vocab_size=400"],
            "from scratch",
            "A base model",
        ),
        (["model=hf", "model.path=published", "model.name=p"], "tuned from ../published", "its own card says"),
        (["model=hf", "model.path=published", "model.name=p", "adapter=lora"], "adapter=lora, merged", "its own card"),
    ],
)
def test_the_card_says_where_the_model_comes_from(published: str, tmp_path: Path, overrides, origin, taught):
    frozen, inputs = frozen_run(*overrides)
    _, run = exported(frozen, inputs, trained_network(frozen, inputs))
    card = (run / "model" / "README.md").read_text()
    assert origin in card
    assert taught in card
    assert "| test/loss | 2.5000 |" in card
    assert str(tmp_path) not in card
