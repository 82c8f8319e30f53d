"""Where a setting was set."""

from pathlib import Path

from llmtrain.config.compose import Composer


def places(composer: Composer, key: str, *overrides: str) -> list[tuple[str, str]]:
    chain = composer.check(list(overrides)).origins().chains[tuple(key.split("."))]
    return [(origin.place, origin.written) for origin in chain]


def test_the_chain_of_a_setting_runs_from_the_first_file_to_the_last_override(composer: Composer):
    line = "trainer.budget_tokens=300_000"
    assert places(composer, "trainer.budget_tokens", "experiment=smoke", line) == [
        ("conf/trainer/_on_text.yaml:3", "???"),
        ("conf/trainer/pretrain.yaml:3", "600_000"),
        ("conf/experiment/smoke.yaml:8", "100_000"),
        (f"override '{line}'", "300_000"),
    ]


def test_keys_inside_a_flow_mapping_have_their_line(composer: Composer):
    assert places(composer, "model.tokenizer.vocab_size") == [("conf/model/qwen3_small.yaml:15", "4096")]


def test_an_override_that_is_a_mapping_sets_each_key_in_it(composer: Composer):
    line = "model.tokenizer={kind: bpe, vocab_size: 400}"
    assert places(composer, "model.tokenizer.vocab_size", line)[-1][0] == f"override '{line}'"


def test_what_nothing_set_comes_from_what_chose_its_kind(composer: Composer):
    origins = composer.check(["data.corpus.kind=files"]).origins()
    assert origins.place(("data", "corpus", "paths")) == "override 'data.corpus.kind=files'"
    assert origins.place(("nothing",)) is None


def test_places_outside_the_working_directory_are_whole_paths(composer: Composer, tmp_path: Path, monkeypatch):
    repository = Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert places(composer, "trainer.seed")[0][0] == f"{repository}/conf/trainer/_base.yaml:2"
