"""`llmtrain explain`: what it prints, exactly, for settings of each sort."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.cli.main import main as llmtrain

Explain = Callable[..., str]


@pytest.fixture
def explain(capsys: pytest.CaptureFixture[str]) -> Explain:
    """Run the command, which must find nothing wrong; what it prints."""

    def run(*words: str) -> str:
        assert llmtrain(["explain", *words]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_a_setting_with_every_place_that_set_it_the_newest_first(explain: Explain):
    assert explain("trainer.lr", "trainer.lr=1e-3") == (
        "trainer.lr = 0.001\n"
        "  Peak learning rate, reached after the warm-up.\n"
        "  wants    a number > 0\n"
        "  changes  the mathematics: another value is another run\n"
        "  set by   override 'trainer.lr=1e-3'    1e-3\n"
        "  before   conf/trainer/pretrain.yaml:6  4.0e-3  # small models take large steps\n"
        "           conf/trainer/_base.yaml:5     ???     # peak learning rate\n"
    )


def test_an_interpolated_value_is_shown_resolved_and_as_it_is_written(explain: Explain):
    lines = explain("name", "model=qwen3_tiny").splitlines()
    assert lines[0] == "name = qwen3_tiny-pretrain"
    assert lines[-1].startswith("  set by   conf/train.yaml:17  ${model.name}-${trainer.kind}  # experiment: directory")


def test_a_setting_that_must_be_given_is_no_mistake_to_ask_about(explain: Explain):
    assert explain("data.corpus.licence", "data=text_files") == (
        "data.corpus.licence = ??? (must be given)\n"
        "  Licence of the text (an SPDX id, or `proprietary`): carried to the manifest and the model card.\n"
        "  wants    text\n"
        "  changes  the prepared data: another run where their content differs\n"
        "  set by   conf/data/text_files.yaml:7  ???  # SPDX id, or proprietary\n"
    )
    assert explain("data.corpus.paths", "data.corpus.kind=files").startswith("data.corpus.paths = ??? (must be given)")


def test_a_setting_of_another_kind_says_which(explain: Explain):
    assert explain("trainer.beta") == (
        "trainer.beta exists only with trainer.kind=dpo\n"
        "  How strongly the policy is held to the reference: the implicit reward is beta times the log-ratio. "
        "`ipo`'s tau;\n  `orpo`'s weight of the odds ratio.\n"
        "  wants    a number > 0\n"
        "  changes  the mathematics: another value is another run\n"
    )
    head = explain("data.corpus.text_field").splitlines()[0]
    assert head == "data.corpus.text_field exists only with data.corpus.kind=jsonl"


def test_a_kind_has_the_meaning_of_the_kind_that_is_chosen(explain: Explain):
    assert explain("trainer.kind", "trainer=dpo") == (
        "trainer.kind = dpo\n"
        "  Direct preference optimisation (arXiv 2305.18290) and its family.\n"
        "  wants    one of pretrain, sft, dpo, distill\n"
        "  changes  the mathematics: another value is another run\n"
        "  set by   conf/trainer/_dpo.yaml:3  dpo  # what llmtrain.config.trainer.DPOTrainer describes\n"
    )


def test_a_group_says_which_option_is_chosen_by_whom_and_lists_its_settings(explain: Explain):
    assert explain("tracking", "tracking=none") == (
        "tracking = none\n"
        "  metrics.jsonl only.\n"
        f"  wants    one of {', '.join(sorted(path.stem for path in Path('conf/tracking').glob('[a-z]*.yaml')))}\n"
        "  set by   override 'tracking=none'  none\n"
        "  before   conf/train.yaml:10        mlflow\n"
        "\n"
        "  tracking.kind  none  conf/tracking/none.yaml:3\n"
    )


def test_an_option_that_an_experiment_chose(explain: Explain):
    assert [line.split() for line in explain("model", "experiment=smoke").splitlines()[3:5]] == [
        ["set", "by", "conf/experiment/smoke.yaml:5", "qwen3_tiny"],
        ["before", "conf/train.yaml:4", "qwen3_small"],
    ]
    assert explain("experiment").startswith("experiment = null\n")
    set_by = explain("trainer", "experiment=smoke").splitlines()[3:5]  # which changes settings of it, not the choice
    assert set_by == ["  set by   conf/train.yaml:6  pretrain", ""]


def test_a_group_inside_a_group_is_told_by_its_kind(explain: Explain):
    assert explain("data.pairs", "trainer=dpo").splitlines()[2:] == [
        "  wants    a group of settings with kind: continuations, jsonl, votes",
        "  set by   conf/data/demo_dpo.yaml:4      ...",
        "  before   conf/data/_preferences.yaml:4  ???  # kind: continuations, jsonl or votes",
        "",
        "  data.pairs.kind                continuations  conf/data/demo_dpo.yaml:5",
        "  data.pairs.prompt_characters   400            conf/data/demo_dpo.yaml:6",
        "  data.pairs.answer_characters   200            conf/data/demo_dpo.yaml:7",
        "  data.pairs.max_training_pairs  1000           conf/data/demo_dpo.yaml:8",
    ]


def test_without_a_key_every_setting_is_listed(explain: Explain):
    rows = [line.split() for line in explain().splitlines()]
    assert ["infra.threads", "null", "conf/infra/_base.yaml:3"] in rows
    assert ["model.tokenizer.vocab_size", "4096", "conf/model/qwen3_small.yaml:15"] in rows
    assert ["trainer.beta"] not in [row[:1] for row in rows]


def test_json_has_the_same(explain: Explain):
    (found,) = json.loads(explain("--json", "trainer.warmup_tokens"))
    assert found == {
        "key": "trainer.warmup_tokens",
        "value": 20_000,
        "meaning": "Tokens over which the learning rate rises linearly from zero.",
        "wants": "a whole number >= 0",
        "changes": "the mathematics: another value is another run",
        "only_with": None,
        "origins": [
            {"place": "conf/trainer/pretrain.yaml:7", "written": "20_000", "comment": ""},
            {"place": "conf/trainer/_base.yaml:7", "written": "???", "comment": "tokens of linear rise"},
        ],
        "inside": [],
    }
    assert [one["key"] for one in json.loads(explain("--json", "tracking"))[0]["inside"]][:1] == ["tracking.kind"]


def test_the_comment_on_the_line_is_found_wherever_the_value_stands(explain: Explain, tmp_path: Path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "mine.yaml"
    path.write_text(
        "defaults: [_text]\n"
        "corpus:   # mine\n"
        "  kind: files\n"
        "  paths: ['a # b.txt',   # no comment of this key: the value goes on\n"
        "    c.txt]\n"
        "  licence: 'MIT # really'   # as its file says\n"
    )
    found = json.loads(
        explain("--json", "--config-dir", str(tmp_path), "data.corpus", "data.corpus.paths", "data=mine")
    )
    corpus, paths = found
    assert corpus["origins"][0]["comment"] == "mine"
    assert (paths["value"], paths["origins"][0]["comment"]) == (["a # b.txt", "c.txt"], "")
    licence = corpus["inside"][-1]
    assert (licence["value"], licence["origins"][0]["comment"]) == ("MIT # really", "as its file says")
    assert licence["origins"][0]["place"] == f"{path}:6"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trainer.lrr", "trainer.lrr: no such setting; did you mean 'trainer.lr'?"),
        ("lr", "lr: no such setting; did you mean 'trainer.lr'?"),
        ("trainr", "trainr: no such setting; did you mean 'trainer'?"),
        ("colour", "colour: no such setting; llmtrain explain lists them all"),
        ("trainer.lr trainer=unheard_of", "trainer: no option 'unheard_of'."),
        ("trainer.lr --config-dir nowhere", "--config-dir nowhere: no such directory"),
        ("trainer.lr --jsn", "--jsn: no such flag; did you mean '--json'?"),
    ],
)
def test_a_mistake_ends_with_2_and_a_message(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert llmtrain(["explain", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_elsewhere_hides_no_explanation(capsys: pytest.CaptureFixture[str]):
    assert llmtrain(["explain", "trainer.lr", "trainer.lrr", "trainer.seed=x", "trainer.sede=3"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("trainer.lr = 0.004\n")
    assert printed.err.splitlines() == [
        "3 problems in the config:",
        "  trainer.lrr: no such setting; did you mean 'trainer.lr'?",
        "  trainer.seed: got 'x', wants a whole number >= 0 (override 'trainer.seed=x')",
        "  trainer.sede: no such setting; did you mean 'trainer.seed'? (override 'trainer.sede=3')",
    ]


def test_help_shows_how_to_ask(explain: Explain):
    lines = explain("--help").splitlines()
    assert any(line.startswith("  llmtrain explain trainer.lr  ") for line in lines)
    assert any(line.startswith("  --json  ") for line in lines)
