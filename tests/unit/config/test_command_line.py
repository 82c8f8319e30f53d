"""Each kind of mistake on a command line gives one clean line, exactly this one."""

from pathlib import Path

import pytest

from llmtrain.config.compose import Composer, load_config
from llmtrain.errors import ConfigError


def read_mistakes() -> dict[str, list[str]]:
    """Each override of mistakes.txt with the lines under it."""
    mistakes: dict[str, list[str]] = {}
    override = ""
    for line in (Path(__file__).parent / "mistakes.txt").read_text().splitlines():
        if line.startswith("    "):
            mistakes[override].append(line.strip())
        elif line and not line.startswith("#"):
            override = line
            mistakes[override] = []
    return mistakes


MISTAKES = read_mistakes()


def problems_of(composer: Composer, *overrides: str) -> list[str]:
    return [str(problem) for problem in composer.check(list(overrides)).problems]


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_gives_exactly_this_line(composer: Composer, override: str):
    assert problems_of(composer, override) == MISTAKES[override]


def test_mandatory_values_are_named_with_the_line_that_leaves_them_open(composer: Composer):
    assert problems_of(composer, "data=text_files") == [
        "data.corpus.paths: must be given; add 'data.corpus.paths=...', a list of text with at least one entry "
        "(conf/data/text_files.yaml:6)",
        "data.corpus.licence: must be given; add 'data.corpus.licence=...', text (conf/data/text_files.yaml:7)",
    ]


def test_a_kind_that_needs_more_settings_says_which(composer: Composer):
    assert problems_of(composer, "data.corpus.kind=files") == [
        "data.corpus.paths: missing; add 'data.corpus.paths=...', a list of text with at least one entry "
        "(override 'data.corpus.kind=files')",
        "data.corpus.licence: missing; add 'data.corpus.licence=...', text (override 'data.corpus.kind=files')",
    ]


def test_a_misspelled_kind_takes_the_old_kinds_keys_away_too(composer: Composer):
    chosen = ["data=text_jsonl", "data.corpus.paths=[a.txt]", "data.corpus.licence=MIT"]  # text_field: of kind jsonl
    assert problems_of(composer, *chosen, "data.corpus.kind=filess") == [
        "data.corpus.kind: got 'filess', wants one of python_docs, files, jsonl; did you mean 'files'? "
        "(override 'data.corpus.kind=filess')"
    ]
    assert problems_of(composer, *chosen, "data.corpus.knd=files") == [
        "data.corpus.knd: no such setting; did you mean 'data.corpus.kind'? (override 'data.corpus.knd=files')"
    ]


def test_text_where_a_list_belongs_is_shown_as_a_list(composer: Composer):
    chosen = ["data=text_files", "data.corpus.licence=MIT"]
    assert problems_of(composer, *chosen, "data.corpus.paths=notes.txt") == [
        "data.corpus.paths: got 'notes.txt', wants a list of text with at least one entry; "
        "write 'data.corpus.paths=[notes.txt]' (override 'data.corpus.paths=notes.txt')"
    ]
    assert problems_of(composer, *chosen, "data.corpus.paths=[1]") == [
        'data.corpus.paths: got 1, wants a list of text with at least one entry; put each in quotes: "1" '
        "(override 'data.corpus.paths=[1]')"
    ]


def test_all_mistakes_of_a_command_line_are_told_at_once_and_in_the_same_order():
    line = ["trainer=dpoo", "model=qwen3_smal", "trainer.lr=x", "trainer.epochs=1.5", "data.split_sed=3"]
    line += ["~infra.threads", "foo=1", "name"]
    with pytest.raises(ConfigError) as first:
        load_config(line)
    with pytest.raises(ConfigError) as second:
        load_config(line)
    assert [problem.split(" ")[0] for problem in first.value.problems] == [
        "foo:", "name:", "model:", "trainer:", "trainer.lr:", "trainer.epochs:", "data.split_sed:", "infra.threads:",
    ]  # fmt: skip
    assert first.value.problems == second.value.problems
    assert str(first.value).startswith("8 problems in the config:\n  foo: no such setting")
    assert first.value.exit_code == 2


def test_a_misspelled_key_counts_where_it_was_meant_so_that_rules_still_hold(composer: Composer):
    assert problems_of(composer, "trainer.budget_token=3_000_000", "trainer.warmup_tokens=2_000_000") == [
        "trainer.budget_token: no such setting; did you mean 'trainer.budget_tokens'? "
        "(override 'trainer.budget_token=3_000_000')"
    ]


def test_a_choice_that_cannot_be_guessed_hides_its_own_group_only(composer: Composer):
    found = problems_of(composer, "trainer=unheard_of", "trainer.clip=0.2", "data.split_sed=1")
    assert [problem.split(" ")[0] for problem in found] == ["trainer:", "data.split_sed:"]


def test_good_overrides_of_every_form_are_accepted():
    config = load_config(
        ["model=qwen3_tiny", "++trainer.lr=1e-4", "trainer.seed=3", "~experiment", "infra.threads=2", "name='a b'"]
    )
    assert (config.model.name, config.trainer.lr, config.trainer.seed) == ("qwen3_tiny", 1e-4, 3)
    assert (config.infra.threads, config.name) == (2, "a b")


def test_the_last_of_two_overrides_counts():
    assert load_config(["trainer.lr=1e-4", "trainer.lr=2e-4"]).trainer.lr == 2e-4


def test_the_trainer_chooses_its_demo_and_a_named_data_set_wins():
    assert load_config(["trainer=dpo"]).data.kind == "preferences"
    chosen = ["data=preference_jsonl", "data.pairs.paths=[votes.jsonl]", "data.pairs.licence=MIT"]
    assert load_config(["trainer=dpo", *chosen]).data.pairs.paths == ("votes.jsonl",)
