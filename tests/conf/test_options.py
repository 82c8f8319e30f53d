"""Every shipped option and experiment composes and validates; `llmtrain check` does the same for users."""

import pytest

from llmtrain.config.check import check_option
from llmtrain.config.compose import Composer
from llmtrain.config.options import conf_directory, description, options
from llmtrain.config.roots import ROOTS, root_for

OPTIONS = options([conf_directory()])
CHOICES = [(group, option) for group, files in OPTIONS.items() for option in files]
NEEDED = {
    ("data", "demo_dpo"): ["trainer=dpo"],
    ("data", "demo_kto"): ["trainer=dpo"],
    ("data", "demo_sft"): ["trainer=sft"],
    ("data", "chat_jsonl"): ["trainer=sft", "data.chats.paths=[STAND_IN]", "data.chats.licence=STAND_IN"],
    ("data", "votes_jsonl"): ["trainer=kto", "data.pairs.paths=[STAND_IN]", "data.pairs.licence=STAND_IN"],
    ("model", "hf"): ["model.name=STAND_IN", "model.path=STAND_IN"],
    ("trainer", "distill"): ["trainer.teacher=STAND_IN"],
    ("data", "preference_jsonl"): [
        "trainer=dpo",
        "data.pairs.paths=[STAND_IN]",
        "data.pairs.licence=STAND_IN",
    ],
    ("environment", "staging"): ["environment.outputs_dir=STAND_IN", "environment.tracking_uri=STAND_IN"],
    ("environment", "prod"): ["environment.outputs_dir=STAND_IN", "environment.tracking_uri=STAND_IN"],
    ("data", "text_files"): ["data.corpus.paths=[STAND_IN]", "data.corpus.licence=STAND_IN"],
    ("data", "text_jsonl"): ["data.corpus.paths=[STAND_IN]", "data.corpus.licence=STAND_IN"],
    ("experiment", "pandalm"): ["data.pairs.paths=[STAND_IN]"],
    ("experiment", "shakespeare_char"): ["data.corpus.paths=[STAND_IN]"],
}


COMPOSERS = {name: Composer((), name, files_stay=True, root=root) for name, root in ROOTS.items()}


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=map("=".join, CHOICES))
def test_shipped_option_is_good_beside_what_it_needs(group: str, option: str):
    needed, problems = check_option(COMPOSERS[root_for(group, "train")], group, option, OPTIONS[group][option], OPTIONS)
    assert problems == []
    of_a_model = ["version=STAND_IN"] if group in ("optimise", "serving") else []
    assert needed == of_a_model + NEEDED.get((group, option), [])


def test_every_group_of_the_issue_has_options():
    assert set(OPTIONS) >= {"data", "model", "trainer", "infra", "tracking", "experiment", "serving", "optimise"}
    assert all(OPTIONS.values())


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=map("=".join, CHOICES))
def test_option_file_begins_with_what_it_is(group: str, option: str):
    assert description(OPTIONS[group][option])
