"""Mistakes in a user's own option files are named with file and line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.check import check_option, hidden_options
from llmtrain.config.compose import Composer, load_config
from llmtrain.config.options import conf_directory, options
from llmtrain.errors import ConfigError

Write = Callable[[str, str], Path]


def problems_of(directory: Path, *overrides: str) -> list[str]:
    return [str(problem) for problem in Composer([directory]).check(list(overrides)).problems]


def test_own_option_inherits_and_changes(write: Write, tmp_path: Path):
    write("trainer/gentle.yaml", "# slower\ndefaults: [pretrain]\nlr: 1e-5\n")
    config = load_config(["trainer=gentle", "data=demo_pretrain"], [tmp_path])
    assert (config.trainer.lr, config.trainer.budget_tokens) == (1e-5, 600_000)


def test_unknown_key_and_wrong_value_in_a_file(write: Write, tmp_path: Path):
    path = write("trainer/gentle.yaml", "defaults: [pretrain]\nlr: slow\nwarmup_token: 3\n")
    assert problems_of(tmp_path, "trainer=gentle", "data=demo_pretrain") == [
        f"trainer.lr: got 'slow', wants a number > 0 ({path}:2)",
        f"trainer.warmup_token: no such setting; did you mean 'trainer.warmup_tokens'? ({path}:3)",
    ]


def test_unknown_key_deep_in_an_experiment_that_is_global(write: Write, tmp_path: Path):
    path = write("experiment/mine.yaml", "# @package _global_\nmodel:\n  tokenizer:\n    vocab_sise: 300\n")
    assert problems_of(tmp_path, "experiment=mine") == [
        f"model.tokenizer.vocab_sise: no such setting; did you mean 'model.tokenizer.vocab_size'? ({path}:4)"
    ]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("name: mine\n  bad: [1\n", 2, "mapping values are not allowed here"),
        ("name: a\nname: b\n", 2, "found duplicate key name"),
        ("name: [a\n", 2, "expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_yaml_that_does_not_parse_hides_no_other_mistake(
    write: Write, tmp_path: Path, text: str, line: int, reason: str
):
    path = write("model/mine.yaml", text)
    assert problems_of(tmp_path, "model=mine", "trainer.lrr=3") == [
        f"{path}:{line}: not valid YAML: {reason} (override 'model=mine')",
        "trainer.lrr: no such setting; did you mean 'trainer.lr'? (override 'trainer.lrr=3')",
    ]


def test_two_files_that_cannot_be_composed_are_both_named(write: Write, tmp_path: Path):
    broken = write("model/broken.yaml", "a: [\n")
    write("experiment/lost.yaml", "# @package _global_\ndefaults:\n  - override /modl: qwen3_tiny\n")
    assert problems_of(tmp_path, "model=broken", "experiment=lost") == [
        f"{broken}:2: not valid YAML: expected the node content, but found '<stream end>' (override 'model=broken')",
        "experiment: cannot be composed: In 'experiment/lost': Could not override 'modl'. "
        "No match in the defaults list; did you mean 'model'? (override 'experiment=lost')",
    ]


def test_inheriting_a_file_that_does_not_exist(write: Write, tmp_path: Path):
    write("model/mine.yaml", "defaults: [_qwen]\n")
    assert problems_of(tmp_path, "model=mine") == [
        "model: needs 'model/_qwen', which does not exist; did you mean '_qwen3'? (override 'model=mine')"
    ]


def test_what_no_override_is_to_blame_for_is_told_once(write: Write, tmp_path: Path):
    write("mine.yaml", "defaults:\n  - model: qwen3_tny\n")
    known = ", ".join(options([conf_directory()])["model"])
    found = [str(problem) for problem in Composer([tmp_path], "mine").check(["+trainer=dpo", "trainer.lr=1"]).problems]
    assert found == [
        f"needs 'model/qwen3_tny', which does not exist; did you mean 'qwen3_tiny'?; choose model=OPTION of {known}"
    ]


def test_a_defaults_list_that_leaves_a_misspelled_group_empty(write: Write, tmp_path: Path):
    write("mine.yaml", "defaults:\n  - train\n  - experimnt: null\n  - _self_\n")
    assert [str(problem) for problem in Composer([tmp_path], "mine").check([]).problems] == [
        "experimnt: no such group; did you mean 'experiment'? (the defaults list of mine.yaml)"
    ]


def test_a_misspelled_kind_in_a_file_hides_no_other_mistake(write: Write, tmp_path: Path):
    path = write("trainer/mine.yaml", "defaults: [pretrain]\nkind: pretrian\nwarmup_token: 3\nlr: fast\n")
    assert problems_of(tmp_path, "trainer=mine", "data=demo_pretrain") == [
        f"trainer.kind: got 'pretrian', wants one of pretrain, sft, dpo, distill; did you mean 'pretrain'? ({path}:2)",
        f"trainer.lr: got 'fast', wants a number > 0 ({path}:4)",
        f"trainer.warmup_token: no such setting; did you mean 'trainer.warmup_tokens'? ({path}:3)",
    ]


def test_a_file_without_its_kind_is_told_so_or_what_the_misspelled_one_means(write: Write, tmp_path: Path):
    path = write("tracking/mine.yaml", "knid: mlflow\nuri: null\n")
    assert problems_of(tmp_path, "tracking=mine") == [
        f"tracking.knid: no such setting; did you mean 'tracking.kind'? ({path}:1)"
    ]
    write("tracking/mine.yaml", "uri: null\n")
    (found,) = problems_of(tmp_path, "tracking=mine")
    assert found.startswith("tracking.kind: missing; add 'tracking.kind=...', one of ")


def test_a_setting_that_is_there_misspelled_is_not_called_missing(write: Write, tmp_path: Path):
    path = write("tracking/mine.yaml", "kind: mlflow\nurii: null\n")
    assert problems_of(tmp_path, "tracking=mine") == [
        f"tracking.urii: no such setting; did you mean 'tracking.uri'? ({path}:2)"
    ]


def test_a_misspelled_key_that_is_left_open_is_told_as_misspelled(write: Write, tmp_path: Path):
    path = write("trainer/mine.yaml", "defaults: [pretrain]\nwarmup_token: ???\ndefautls: [dpo]\n")
    assert problems_of(tmp_path, "trainer=mine", "data=demo_pretrain") == [
        f"trainer.defautls: no such setting; did you mean 'defaults'? ({path}:3)",
        f"trainer.warmup_token: no such setting; did you mean 'trainer.warmup_tokens'? ({path}:2)",
    ]


def test_own_trainer_without_a_demo_of_its_own_is_told_to_choose_data(write: Write, tmp_path: Path):
    write("trainer/mine.yaml", "defaults: [dpo]\n")
    assert problems_of(tmp_path, "trainer=mine") == [
        "trainer: needs 'data/demo_mine', which does not exist; choose data=OPTION of chat_jsonl, "
        "demo_distill, demo_dpo, demo_kto, demo_pretrain, demo_sft, preference_jsonl, "
        "text_files, text_jsonl, votes_jsonl (override 'trainer=mine')"
    ]


def test_interpolation_that_fails_in_a_file(write: Write, tmp_path: Path):
    path = write("trainer/mine.yaml", "defaults: [pretrain]\nseed: ${trainer.sed}\n")
    assert problems_of(tmp_path, "trainer=mine", "data=demo_pretrain") == [
        f"trainer.seed: '${{trainer.sed}}' cannot be resolved: Interpolation key 'trainer.sed' not found ({path}:2)"
    ]


@pytest.mark.parametrize("content", [b"", b"hello", b"- a\n- b\n", b"name: \xff\n", b"# @package a b\nname: a\n"])
def test_a_file_of_any_content_gives_problems_and_no_traceback(tmp_path: Path, content: bytes):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "odd.yaml").write_bytes(content)
    assert any("override 'model=odd'" in problem for problem in problems_of(tmp_path, "model=odd"))


def test_a_group_of_ones_own_is_added_with_plus_and_its_keys_are_judged(write: Write, tmp_path: Path):
    path = write("optimizer/adam.yaml", "foreign: 0.9\n")
    assert problems_of(tmp_path, "optimizer=adam") == [
        "optimizer: write '+optimizer=adam' (override 'optimizer=adam')",
        f"optimizer.foreign: no such setting; llmtrain explain lists them all ({path}:1)",
    ]


def test_a_directory_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"--config-dir nowhere: no such directory"):
        load_config([], [Path("nowhere")])


def test_a_defaults_list_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"--config-name nope: no such file on the search path"):
        load_config([], config_name="nope")


def test_a_defaults_list_of_ones_own_lacks_a_group(write: Write, tmp_path: Path):
    write("mine.yaml", "defaults:\n  - train\n  - _self_\n  - override infra: local_gpu\nname: mine\n")
    assert load_config([], [tmp_path], "mine").infra.accelerator == "cuda"
    write("short.yaml", "defaults:\n  - _self_\n  - model: qwen3_tiny\nname: short\n")
    found = [str(problem) for problem in Composer([tmp_path], "short").check([]).problems]
    assert "data: missing; add '+data=OPTION', or '- data: OPTION' to the defaults list" in found


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("hydra.searchpath=3", "hydra.searchpath must be a list of strings. Got: 3"),
        ("hydra.searchpath=[nowhere]", "provider=hydra.searchpath in command-line, path=nowhere is not available."),
    ],
)
def test_a_search_path_that_cannot_be_searched(override: str, reason: str):
    with pytest.raises(ConfigError) as error:
        load_config([override])
    assert error.value.problems == [f"cannot be composed: {reason}"]


def test_a_defaults_list_that_does_not_parse(write: Write, tmp_path: Path):
    path = write("mine.yaml", "defaults: [\n")
    with pytest.raises(ConfigError, match=rf"{path}:2: not valid YAML"):
        load_config([], [tmp_path], "mine")


def test_check_says_what_an_option_needs_and_what_is_wrong(write: Write, tmp_path: Path):
    good = write("trainer/gentle.yaml", "defaults: [dpo]\nlr: 1e-5\n")
    wrong = write("trainer/rough.yaml", "defaults: [_dpo]\nlr: -1\n")
    composer, found = Composer([tmp_path]), options([conf_directory(), tmp_path])
    assert check_option(composer, "trainer", "gentle", good, found) == (["data=demo_dpo"], [])
    needed, problems = check_option(composer, "trainer", "rough", wrong, found)
    assert needed == []
    assert problems


def test_an_own_option_with_the_name_of_a_shipped_one_is_hidden(write: Write, tmp_path: Path):
    path = write("model/qwen3_tiny.yaml", "name: mine\n")
    assert hidden_options(conf_directory(), [tmp_path]) == [
        f"model=qwen3_tiny: hidden by the shipped option of that name; rename {path}"
    ]


def test_another_kind_by_override_takes_the_old_kinds_keys_away():
    for overrides in (
        ["model.tokenizer={kind: hf, path: elsewhere}"],
        ["model.tokenizer.kind=hf", "model.tokenizer.path=elsewhere"],
    ):
        tokenizer = load_config(overrides).model.tokenizer
        assert tokenizer.model_dump() == {"kind": "hf", "path": "elsewhere"}
    back = load_config(["data=text_files", "data.corpus.kind=python_docs"])  # paths and licence were left open there
    assert back.data.corpus.model_dump() == {"kind": "python_docs"}


def test_another_kind_in_a_later_file_takes_the_old_kinds_keys_away(write: Write, tmp_path: Path):
    write("experiment/letters.yaml", "# @package _global_\nmodel: {tokenizer: {kind: characters}}\n")
    write("model/mine.yaml", "defaults: [qwen3_small]\ntokenizer: {kind: characters}\n")
    write("data/mine.yaml", "defaults: [text_files]\ncorpus: {kind: python_docs}\n")
    for choice in ("experiment=letters", "model=mine"):
        assert load_config([choice], [tmp_path]).model.tokenizer.model_dump() == {"kind": "characters"}
    assert load_config(["data=mine"], [tmp_path]).data.corpus.model_dump() == {"kind": "python_docs"}


def test_what_an_override_set_for_the_old_kind_is_still_a_mistake():
    with pytest.raises(ConfigError, match=r"vocab_size: no such setting with model\.tokenizer\.kind=hf"):
        load_config(["model.tokenizer.kind=hf", "model.tokenizer.path=elsewhere", "model.tokenizer.vocab_size=400"])
