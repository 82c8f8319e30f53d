"""What a difference changes, and that the verdict says what the run id says."""

import shutil
from pathlib import Path

import pytest

from llmtrain.config.base import Changes
from llmtrain.config.compare import RESOLVED, Comparison, Side, compare, composed, first_sentence, of_run
from llmtrain.config.compose import Composer
from llmtrain.config.frozen import FrozenRun, Resolved, thaw
from llmtrain.config.options import conf_directory
from llmtrain.errors import UserError

FROZEN = Path(__file__).parents[2] / "golden" / "frozen"
PAIRS = ["trainer=dpo", "data=preference_jsonl", "data.pairs.licence=MIT"]
NOTHING = dict.fromkeys(Resolved.model_fields)


@pytest.fixture(scope="module")
def side() -> "type":
    composer = Composer()
    return lambda *overrides: composed(" ".join(overrides), composer.check(list(overrides)))


def changed(found: Comparison) -> dict[str, Changes]:
    return {one.key: one.changes for one in found.differences}


def test_each_difference_stands_under_what_it_changes_the_gravest_first(side):
    found = compare(
        side("name=x"), side("infra.micro_batch_tokens=512", "trainer.lr=1e-3", "data.split_seed=7", "name=y")
    )
    assert list(changed(found).items()) == [
        ("trainer.lr", Changes.MATHEMATICS),
        ("data.split_seed", Changes.DATA),
        ("infra.micro_batch_tokens", Changes.PERFORMANCE),
        ("name", Changes.SURFACE),
    ]
    lr = found.differences[0]
    assert (lr.before, lr.after) == (0.004, 0.001)
    assert lr.set_by_before is not None
    assert lr.set_by_before.endswith("conf/trainer/pretrain.yaml:6")
    assert lr.set_by_after == "override 'trainer.lr=1e-3'"
    assert lr.meaning == "Peak learning rate, reached after the warm-up."


def test_a_setting_of_another_kind_is_on_one_side_only(side):
    found = {one.key: one for one in compare(side(), side("adapter=lora", "adapter.rank=8")).differences}
    assert (found["adapter.kind"].before, found["adapter.kind"].after) == ("none", "lora")
    assert found["adapter.kind"].meaning.startswith("Low-rank updates of frozen linear layers")
    assert (found["adapter.rank"].only, found["adapter.rank"].after) == ("after", 8)


IS_ANOTHER = {
    (): False,
    ("name=x",): False,
    ("tracking=none",): False,
    ("infra.micro_batch_tokens=512",): False,
    ("infra.threads=1", "infra.compile=true"): False,
    ("trainer.seed=1",): True,
    ("trainer.sample_tokens=1",): False,
    ("adapter=lora",): True,
    ("infra.precision=fp32",): True,
    ("model.num_hidden_layers=3", "name=x"): True,
    ("data.split_seed=7",): None,
    ("data=text_files", "data.corpus.paths=[a.txt]", "data.corpus.licence=MIT"): None,
}


@pytest.mark.parametrize(("overrides", "is_another"), IS_ANOTHER.items(), ids=str)
def test_the_verdict_is_what_the_run_id_says_where_all_else_is_equal(overrides: tuple[str, ...], is_another, side):
    before, after = side(), side(*overrides)
    resolved = Resolved(
        **{**NOTHING, "tokenizer_path": "t", "tokenizer_sha256": "1", "text_path": "d", "text_sha256": "2"}
    )
    ids = {FrozenRun(config=one.config, resolved=resolved, attempt=1).run_id for one in (before, after)}
    found = compare(before, after).verdict
    assert found.is_another_run is is_another
    assert (len(ids) == 2) is bool(is_another)


def test_a_name_of_a_file_or_a_model_may_be_another_run(side):
    before = side(*PAIRS, "data.pairs.paths=[a.jsonl]")
    found = compare(before, side(*PAIRS, "data.pairs.paths=[b.jsonl]"))
    assert changed(found) == {"data.pairs.paths": Changes.DATA}
    assert found.verdict.text.startswith("another run if what data.pairs.paths names differs")
    found = compare(before, side(*PAIRS, "data.pairs.paths=[a.jsonl]", "trainer.init_from=x@1.0.0"))
    assert changed(found) == {"trainer.init_from": Changes.MATHEMATICS}
    assert found.verdict.is_another_run is None


def test_every_reference_of_a_run_changes_what_its_id_depends_on():
    run = thaw(FROZEN / "v2-dpo.json")
    for name in Resolved.model_fields:
        other = run.model_copy(update={"resolved": run.resolved.model_copy(update={name: "0" * 64})})
        found = compare(of_run("a", run), of_run("b", other))
        assert [one.key for one in found.differences] == [f"resolved.{name}"]
        assert found.verdict.is_another_run is (other.run_id != run.run_id) is (name in RESOLVED)
        assert found.differences[0].changes == RESOLVED.get(name, Changes.SURFACE)


def test_of_runs_the_hashes_decide_and_names_are_only_names():
    run = thaw(FROZEN / "v2-dpo.json")
    trainer = run.config.trainer.model_copy(update={"init_from": "elsewhere@2.0.0"})
    same = run.model_copy(update={"config": run.config.model_copy(update={"trainer": trainer})})
    found = compare(of_run("a", run), of_run("b", same))
    assert changed(found) == {"trainer.init_from": Changes.SURFACE}
    assert found.verdict.text == "the same run, a981d8941556: other names or other reports"
    again = compare(of_run("a", run), of_run("b", run.model_copy(update={"attempt": 2})))
    assert again.differences == ()
    assert again.verdict.text.endswith("of the same mathematics and data: attempt 1 and 2")


def old_conf(tmp_path: Path, leave_out: str) -> Path:
    """conf/ as schema 2 had it, without the lines that begin with one of these words."""
    conf = tmp_path / "conf"
    shutil.copytree(conf_directory(), conf)
    train = conf / "train.yaml"
    train.write_text(train.read_text().replace("schema_version: 5", "schema_version: 2"))
    for path in conf.rglob("*.yaml"):
        kept = [line for line in path.read_text().splitlines(True) if not line.startswith(tuple(leave_out.split()))]
        path.write_text("".join(kept))
    return conf


def at(conf: Path, *overrides: str) -> Side:
    return composed("old", Composer(shipped=conf).check(list(overrides)), str(conf.parent))


def test_conf_of_an_older_schema_does_what_it_did(tmp_path: Path, side):
    conf = old_conf(tmp_path, "schedule: decay_share: attention: activation_checkpointing:")
    found = compare(at(conf), side("infra.attention=sdpa", "trainer.schedule=wsd"))
    assert {one.key: (one.before, one.after) for one in found.differences} == {
        "trainer.schedule": ("cosine", "wsd"),
        "infra.attention": ("auto", "sdpa"),
    }
    with pytest.raises(
        UserError, match=r"old: 1 problem;[\s\S]*trainer.lrr: no such setting; did you mean 'trainer.lr'"
    ):
        at(conf, "trainer.lrr=3")


def test_an_override_that_an_older_conf_does_not_know_is_told(tmp_path: Path):
    conf = old_conf(tmp_path, "schedule:")
    train = conf / "train.yaml"
    train.write_text(train.read_text().replace("  - adapter: none\n", ""))
    shutil.rmtree(conf / "adapter")
    assert at(conf).config.adapter.kind == "none"
    with pytest.raises(UserError, match="adapter"):
        at(conf, "adapter=lora")


def test_conf_that_this_version_cannot_read_says_which_settings(tmp_path: Path):
    conf = old_conf(tmp_path, "schedule: weight_decay:")
    with pytest.raises(
        UserError, match=r"1 problem; settings that this llmtrain does not know[\s\S]*trainer.weight_decay"
    ):
        at(conf)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One. Two.", "One."),
        ("Rises to\n    0.5 of it; then falls", "Rises to 0.5 of it; then falls"),
        ("", ""),
    ],
)
def test_first_sentence(text: str, first: str):
    assert first_sentence(text) == first
