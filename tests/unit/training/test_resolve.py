"""What a run starts from, learns from and reads, and that config.json alone brings it back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmtrain.artifacts import TrainedModel, weights_sha256
from llmtrain.cli import plan
from llmtrain.config.compose import load_config
from llmtrain.config.data import TextData
from llmtrain.config.frozen import FrozenRun
from llmtrain.errors import CheckpointMismatch, IntegrityError, TokenizerMismatch, UserError
from llmtrain.models import directory as model_directory
from llmtrain.models import pretrained
from llmtrain.models.build import build, shape_sha256
from llmtrain.registry.registry import Registry
from llmtrain.training.resolve import Inputs, already_prepared, inputs_of, resolve

TEXT = "the quick brown fox jumps over the lazy dog and runs to a river where it drinks cold water"
WORDS = TEXT.split()
TINY = ("model=qwen3_tiny", "model.vocab_size=400", "model.tokenizer.vocab_size=400", "infra.precision=fp32")
CHATS = "data.chats={kind: jsonl, paths: [chats.jsonl], licence: MIT, format: messages}"


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with 40 short documents, as many chats and pairs, and `outputs`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    chats, pairs = [], []
    for number in range(40):
        words = [WORDS[(number * step) % len(WORDS)] for step in range(1, 40)]
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} " + " ".join(words))
        turns = [{"role": "user", "content": f"What of {number}?"}, {"role": "assistant", "content": words[0]}]
        chats.append(json.dumps({"messages": turns}))
        pairs.append(json.dumps({"prompt": f"say {number}", "chosen": words[1], "rejected": words[2] + "!"}))
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))


def config(*overrides: str):
    shares = ("data.validation_share=0.2", "data.test_share=0.2")
    files = "data.corpus={kind: files, paths: [text/*.txt], licence: MIT}"
    return load_config([files, *shares, "trainer.sequence_tokens=64", "tracking=none", *overrides])


def pretrain(*overrides: str):
    return config("data=text_files", *overrides)


def sft(*overrides: str):
    return config("trainer=sft", CHATS, *overrides)


def dpo(*overrides: str):
    pairs = "data.pairs={kind: jsonl, paths: [pairs.jsonl], licence: MIT, template: plain}"
    return config("trainer=dpo", pairs, *overrides)


def no_base() -> TrainedModel:
    raise AssertionError("nothing is to be trained")


def resolved(settings, outputs: Path) -> tuple[FrozenRun, Inputs]:
    return resolve(settings, outputs, no_base, lambda line: None)


@pytest.fixture
def published(outputs: Path, tmp_path: Path) -> Path:
    """A Llama of 400 rows and 80 positions with a tokenizer of ours."""
    _, inputs = resolved(pretrain(*TINY), outputs)
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    network = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=80))
    model_directory.save(network, inputs.tokenizer_directory, tmp_path / "published", card="")
    return tmp_path / "published"


@pytest.fixture
def finished(outputs: Path) -> Callable[..., TrainedModel]:
    """A run's directory under outputs, as training leaves it, of fresh weights."""

    def make(settings, run_id: str, **changed: object) -> TrainedModel:
        frozen, inputs = resolved(settings, outputs)
        run = outputs / "base" / run_id
        torch.manual_seed(len(run_id))
        model_directory.save(build(settings.model), inputs.tokenizer_directory, run / "model", card="")
        trained = TrainedModel(
            parents=(), run_id=run_id, path=f"base/{run_id}/model", trainer="pretrain",
            shape_sha256=shape_sha256(settings.model), weights_sha256=weights_sha256(run / "model"),
            tokenizer_sha256=frozen.resolved.tokenizer_sha256, config_sha256="c", recipe_sha256="r",
            dataset_sha256=inputs.dataset_sha256, parent_version=None, num_tokens_seen=1, metrics={},
        ).model_copy(update=changed)  # fmt: skip
        trained.write(run / "trained.json")
        (run / "checkpoints").mkdir()
        return trained

    return make


def test_from_scratch_there_is_no_parent(outputs: Path):
    frozen, inputs = resolved(pretrain(*TINY), outputs)
    assert inputs.parent is None
    assert frozen.resolved.parent_path is None
    assert inputs.shape_sha256 == shape_sha256(frozen.config.model)
    assert [manifest.kind for manifest in inputs.manifests] == ["text"]


def test_a_published_model_starts_from_its_own_weights_whatever_trains_it(outputs: Path, published: Path):
    hf = ("model=hf", f"model.path={published}", "model.name=published")
    teacher = f"trainer.teacher={published}"
    for settings in (pretrain(*hf), sft(*hf), dpo(*hf), config("trainer=distill", "data=text_files", teacher, *hf)):
        frozen, inputs = resolved(settings, outputs)
        assert inputs.parent is not None
        assert inputs.parent.directory == published
        assert frozen.resolved.parent_weights_sha256 == weights_sha256(published)
        assert (outputs / frozen.resolved.parent_path).resolve() == published.resolve()
        assert frozen.resolved.parent_version is None


def test_a_run_is_named_by_a_models_content_and_not_by_its_place(outputs: Path, published: Path, tmp_path: Path):
    def run_id(path: Path, name: str) -> str:
        return resolved(sft("model=hf", f"model.path={path}", f"model.name={name}"), outputs)[0].run_id

    shutil.copytree(published, tmp_path / "copy")
    assert run_id(published, "here") == run_id(tmp_path / "copy", "there")
    network = model_directory.load(tmp_path / "copy")
    with torch.no_grad():
        network.model.norm.weight[0] += 1
    network.save_pretrained(tmp_path / "copy")
    assert run_id(published, "here") != run_id(tmp_path / "copy", "there")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.sequence_tokens=96"], r"published: trainer\.sequence_tokens=96 is longer than.*=80"),
        (["trainer.sample_tokens=80"], r"published: trainer\.sample_tokens=80 leaves no room"),
        (["model.tokenizer={kind: hf, path: large}"], r"has 500 entries, but published has 400 rows"),
    ],
)
def test_what_does_not_fit_a_published_model_is_refused(
    outputs: Path, published: Path, tmp_path: Path, overrides, message
):
    large = ("model.vocab_size=500", "model.tokenizer.vocab_size=500")
    (tmp_path / "more.txt").write_text(" ".join(f"{a}{b}{c}" for a in WORDS for b in WORDS for c in WORDS[:4]))
    files = "data.corpus={kind: files, paths: ['*.txt', 'text/*.txt'], licence: MIT}"
    _, inputs = resolved(pretrain(*TINY, *large, files, "data.split_seed=3"), outputs)
    shutil.copytree(inputs.tokenizer_directory, tmp_path / "large")
    with pytest.raises(UserError, match=message):
        resolved(sft("model=hf", f"model.path={published}", "model.name=published", *overrides), outputs)


def test_latest_of_a_scratch_model_is_the_newest_pretrained_version(outputs: Path, finished):
    registry = Registry(outputs)
    registry.register("base", finished(pretrain(*TINY), "one"), tracker_run_id=None)
    newest = finished(pretrain(*TINY), "three")
    registry.register("base", newest, tracker_run_id=None)
    tuned = finished(pretrain(*TINY), "seven", trainer="sft")
    registry.register("base", tuned, tracker_run_id=None)
    for settings in (sft(*TINY), dpo(*TINY)):
        frozen, inputs = resolved(settings, outputs)
        assert frozen.resolved.parent_version == "base@1.0.1"
        assert inputs.parent is not None
        assert inputs.parent.record == newest
    frozen, _ = resolved(dpo(*TINY, "trainer.init_from=base@1.1.0"), outputs)
    assert frozen.resolved.parent_weights_sha256 == tuned.weights_sha256


def test_latest_trains_a_base_where_there_is_none(outputs: Path, finished):
    def train_base() -> TrainedModel:
        trained = finished(pretrain(*TINY), "base")
        Registry(outputs).register("base", trained, tracker_run_id=None)
        return trained

    said: list[str] = []
    frozen, _ = resolve(sft(*TINY), outputs, train_base, said.append)
    assert frozen.resolved.parent_version == "base@1.0.0"
    assert any("training it first" in line for line in said)


def test_a_runs_directory_names_its_model_and_another_shape_is_told_apart(outputs: Path, finished):
    trained = finished(pretrain(*TINY), "one")
    frozen, inputs = resolved(sft(*TINY, f"trainer.init_from={outputs}/base/one"), outputs)
    assert frozen.resolved.parent_path == "base/one/model"
    assert inputs.parent is not None
    assert inputs.parent.record == trained
    with pytest.raises(CheckpointMismatch, match=r"hidden_size=64 \(the config asks for 32\)"):
        resolved(sft(*TINY, "model.hidden_size=32", f"trainer.init_from={outputs}/base/one"), outputs)


def test_a_tuned_published_model_is_a_parent_of_its_kind_only(outputs: Path, published: Path, tmp_path: Path, finished):
    hf = ("model=hf", f"model.path={published}", "model.name=published")
    tuned = tmp_path / "tuned"
    network = model_directory.load(published)
    with torch.no_grad():
        network.model.norm.weight[0] += 1
    model_directory.save(network, published, tuned, card="")
    frozen, _ = resolved(sft(*hf, f"trainer.init_from={tuned}"), outputs)
    assert frozen.resolved.parent_weights_sha256 == weights_sha256(tuned) != weights_sha256(published)
    finished(pretrain(*TINY), "one")
    with pytest.raises(CheckpointMismatch, match=r"model_type=qwen3 \(the config asks for llama\)"):
        resolved(sft(*hf, f"trainer.init_from={outputs}/base/one"), outputs)


def test_a_name_that_names_nothing_is_refused_with_its_setting(outputs: Path):
    with pytest.raises(UserError, match=r"trainer\.init_from=nowhere: no finished run"):
        resolved(sft(*TINY, "trainer.init_from=nowhere"), outputs)
    with pytest.raises(UserError, match=r"trainer\.teacher=nowhere: no finished run"):
        resolved(config("trainer=distill", "data=text_files", "trainer.teacher=nowhere", *TINY), outputs)


def test_changed_weights_of_a_parent_are_found(outputs: Path, finished):
    finished(pretrain(*TINY), "one")
    with (outputs / "base" / "one" / "model" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="the weights are not those"):
        resolved(sft(*TINY, f"trainer.init_from={outputs}/base/one"), outputs)


def test_a_teacher_is_part_of_the_run_and_must_share_the_vocabulary(outputs: Path, finished, published: Path):
    def distill(teacher: str) -> FrozenRun:
        return resolved(config("trainer=distill", "data=text_files", f"trainer.teacher={teacher}", *TINY), outputs)[0]

    one, three = (finished(pretrain(*TINY), run_id) for run_id in ("one", "three"))
    first, second = distill(f"{outputs}/base/one"), distill(f"{outputs}/base/three")
    assert first.resolved.teacher_weights_sha256 == one.weights_sha256
    assert second.resolved.teacher_weights_sha256 == three.weights_sha256
    assert first.run_id != second.run_id
    assert first.resolved.parent_path is None  # trainer.init_from=scratch
    assert distill(str(published)).resolved.teacher_weights_sha256 == weights_sha256(published)
    finished(pretrain(*TINY, "model.tokenizer.vocab_size=300"), "other")
    with pytest.raises(TokenizerMismatch, match="another vocabulary than the student"):
        distill(f"{outputs}/base/other")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (["adapter=lora"], r"adapter=lora updates weights that are good already.*use adapter=none"),
        (["adapter=qlora", "model=hf", "model.path=published", "model.name=p"], "needs CUDA.*use adapter=lora"),
    ],
)
def test_an_adapter_that_cannot_work_is_refused_before_anything_is_prepared(tmp_path: Path, adapter, message):
    with pytest.raises(UserError, match=message):
        resolved(pretrain(*(TINY if len(adapter) == 1 else ()), *adapter), tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


def test_an_adapter_is_another_run(outputs: Path, published: Path):
    hf = ("model=hf", f"model.path={published}", "model.name=published")
    ids = {
        resolved(sft(*hf, *adapter), outputs)[0].run_id
        for adapter in ([], ["adapter=lora"], ["adapter=lora", "adapter.rank=8"], ["adapter=lora", "adapter.dora=true"])
    }
    assert len(ids) == 4


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo", "distill"])
def test_config_json_alone_brings_the_inputs_back(outputs: Path, finished, tmp_path: Path, kind):
    Registry(outputs).register("base", finished(pretrain(*TINY), "one"), tracker_run_id=None)
    match kind:
        case "pretrain":
            settings = pretrain(*TINY)
        case "sft":
            settings = sft(*TINY)
        case "dpo":
            settings = dpo(*TINY)
        case _:
            settings = config("trainer=distill", "data=text_files", "trainer.teacher=base@1.0.0", *TINY)
    frozen, inputs = resolved(settings, outputs)
    again = FrozenRun.model_validate_json(frozen.model_dump_json())
    found = inputs_of(again, outputs)
    assert (found.manifests, found.dataset_sha256) == (inputs.manifests, inputs.dataset_sha256)
    assert found.shape_sha256 == inputs.shape_sha256
    for ours, theirs in ((found.parent, inputs.parent), (found.teacher, inputs.teacher)):
        assert (ours is None) == (theirs is None)
        if ours and theirs:
            assert ours.directory.resolve() == theirs.directory.resolve()
            assert (ours.weights_sha256, ours.record) == (theirs.weights_sha256, theirs.record)
    assert found.parent is None or found.parent.version == "base@1.0.0"
    moved = outputs.rename(tmp_path / "elsewhere")
    assert inputs_of(again, moved).manifests == inputs.manifests


@pytest.mark.parametrize(
    ("gone", "error", "message"),
    [
        (lambda resolved: resolved.text_path, IntegrityError, "made anew"),
        (lambda resolved: resolved.chats_path, IntegrityError, "made anew"),
        (lambda resolved: resolved.tokenizer_path, IntegrityError, "the tokenizer is gone"),
        (lambda resolved: resolved.parent_path, UserError, "starts from, or learns from, is gone"),
    ],
)
def test_what_is_gone_is_named(outputs: Path, finished, gone, error, message):
    finished(pretrain(*TINY), "one")
    frozen, _ = resolved(sft(*TINY, f"trainer.init_from={outputs}/base/one"), outputs)
    shutil.rmtree(outputs / gone(frozen.resolved))
    with pytest.raises(error, match=message):
        inputs_of(frozen, outputs)


def test_other_data_in_their_place_are_found(outputs: Path):
    frozen, inputs = resolved(pretrain(*TINY), outputs)
    manifest = outputs / inputs.text.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(inputs.text.content_sha256, "0" * 64))
    with pytest.raises(IntegrityError, match="other data than this run was frozen with"):
        inputs_of(frozen, outputs)


def test_prepared_data_are_found_for_a_plan_and_none_are_prepared(
    outputs: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hf = ("model=hf", f"model.path={published}", "model.name=published")
    for settings in (
        sft(*hf),
        dpo(*hf),
        config("trainer=distill", "data=text_files", f"trainer.teacher={published}", *hf),
    ):
        before = sorted(outputs.rglob("*"))
        data = already_prepared(settings, outputs)
        assert sorted(outputs.rglob("*")) == before
        if not isinstance(settings.data, TextData):  # the text is what `published` was made with
            assert data is None
        _, inputs = resolved(settings, outputs)
        assert already_prepared(settings, outputs) == inputs.manifests[-1]
    assert already_prepared(dpo(*hf, "trainer.sequence_tokens=40"), outputs) is None, "other pairs fit"
    with monkeypatch.context() as unhashed:
        unhashed.setattr(pretrained, "weights_sha256", lambda directory: pytest.fail("a plan hashes no weights"))
        assert already_prepared(dpo(*hf), outputs) is not None
    (tmp_path / "pairs.jsonl").write_text("")
    assert already_prepared(dpo(*hf), outputs) is None, "the file is another one"


@pytest.mark.parametrize(
    "line",
    [
        ("model=hf", "model.path=owner/name", "model.name=name"),
        (*TINY[:2], "model.tokenizer={kind: hf, path: owner/name}"),
    ],
)
def test_nothing_is_fetched_for_a_plan(outputs: Path, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...]):
    asked = []

    def hub(name: str, *, local_files_only: bool, **others: object) -> None:
        asked.append((name, local_files_only))
        raise OSError("not in the cache")

    (outputs / "data").mkdir(parents=True)  # where there is none, nobody looks further
    monkeypatch.setattr(pretrained, "snapshot_download", hub)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", hub)
    assert already_prepared(pretrain(*line) if line[0] != "model=hf" else sft(*line), outputs) is None
    assert asked == [("owner/name", True)]


def test_a_plan_knows_the_steps_of_prepared_pairs(published: Path, capsys: pytest.CaptureFixture[str]):
    pairs = "data.pairs={kind: jsonl, paths: [pairs.jsonl], licence: MIT, template: plain}"
    line = [
        *("trainer=dpo", "model=hf", f"model.path={published}", "model.name=published", "infra=h100", pairs),
        *("data.corpus={kind: files, paths: [text/*.txt], licence: MIT}", "data.validation_share=0.2"),
        *("data.test_share=0.2", "trainer.sequence_tokens=64", "trainer.batch_rows=4", "trainer.epochs=3"),
    ]
    assert plan.main([*line, "--json"]) == 0
    unknown = json.loads(capsys.readouterr().out)
    assert unknown["steps"] is None
    assert unknown["workload_from"].endswith("a guess: the data are not prepared")
    _, inputs = resolved(load_config([*line, "infra=local_cpu"]), Path("outputs"))
    assert plan.main([*line, "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    number = inputs.pairs.splits["train"].num_documents
    assert 10 < number < 40
    assert known["steps"] == -(-3 * number // 4)
    assert known["workload_from"].endswith("the mean of the prepared data")
