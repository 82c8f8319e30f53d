"""`python train.py`: what it prints, and what it needs to import for that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.cli.main import main as llmtrain
from llmtrain.cli.train import base_of, main
from llmtrain.config.compose import load_config
from llmtrain.errors import ConfigError

HEAVY = ["torch", "lightning", "transformers", "mlflow", "numpy", "matplotlib"]


@pytest.fixture(autouse=True)
def _in_the_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", str(repository))


def modules_after(code: str) -> set[str]:
    script = f"import sys, json\nout = sys.stdout\nsys.stdout = sys.stderr\n{code}\njson.dump(list(sys.modules), out)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return set(json.loads(done.stdout))


def test_composing_imports_nothing_heavy():
    assert modules_after("from llmtrain.config.compose import load_config; load_config([])").isdisjoint(HEAVY)


def test_help_imports_neither_the_heavy_nor_hydra_nor_pydantic():
    loaded = modules_after("from llmtrain.cli.train import main; main(['--help'])")
    assert loaded.isdisjoint([*HEAVY, "hydra", "omegaconf", "pydantic", "yaml"])


def test_a_typo_is_told_before_anything_heavy_is_imported():
    loaded = modules_after("from llmtrain.cli.train import main; assert main(['trainer.lrr=1']) == 2")
    assert loaded.isdisjoint(HEAVY)


def test_help_names_each_option_with_the_first_line_of_its_file(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  model=" in lines
    assert "    qwen3_tiny         For tests: trains in seconds, learns little." in lines
    assert not any(line.strip().startswith("_") for line in lines)
    assert any("--cfg job" in line for line in lines[-2:])


def test_help_lists_the_users_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# My own.\ndefaults: [qwen3_tiny]\n")
    assert main(["--help", "--config-dir", str(tmp_path)]) == 0
    assert "    mine               My own." in capsys.readouterr().out.splitlines()


HYDRA = """
import sys, hydra
hydra.main(version_base="1.3", config_path=sys.argv.pop(1), config_name="train")(lambda config: None)()
"""


@pytest.mark.parametrize(
    "line",
    [
        "--cfg job",
        "--cfg job --resolve trainer=dpo model=qwen3_tiny",
        "--cfg job --package trainer trainer.lr=1e-4",
        "--cfg job -p trainer.lr",
        "--cfg hydra --package hydra.runtime.choices model=qwen3_tiny",
        "--info defaults experiment=smoke",
        "--info=searchpath",
    ],
)
def test_what_is_printed_is_what_hydra_prints(line: str, repository: Path):
    ours = subprocess.run([sys.executable, "train.py", *line.split()], capture_output=True, text=True, check=True)
    command = [sys.executable, "-c", HYDRA, str(repository / "conf"), *line.split()]
    assert ours.stdout == subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ours.stdout
    assert ours.stderr == ""


def test_versions_are_those_that_are_installed(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("Hydra 1.3.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--cfg job trainer.lrr=1",
            "trainer.lrr: no such setting; did you mean 'trainer.lr'? (override 'trainer.lrr=1')",
        ),
        ("--info defaults model=qwen3_tin", "model: no option 'qwen3_tin'; did you mean 'qwen3_tiny'?"),
        ("-m trainer.lr=a,b", "trainer.lr: got 'b', wants a number > 0 (override 'trainer.lr=b')"),
        ("--cfg job -m trainer.lr=1,2", "--multirun and --cfg exclude each other"),
        ("--resolve", "--resolve goes with --cfg job|hydra|all"),
        ("--cfg job --package nope", "--package nope: the config has no such part"),
        ("--config-dir nowhere", "--config-dir nowhere: no such directory"),
    ],
)
def test_mistake_ends_with_2_and_a_message(line: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_composing_leaves_no_file_behind(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for line in (["--cfg", "job"], ["--info", "all"], ["--cfg", "hydra"]):
        subprocess.run([sys.executable, str(repository / "train.py"), *line], capture_output=True, check=True)
    assert list(tmp_path.iterdir()) == []


def test_base_of_a_tuning_run_keeps_model_corpus_machine_and_outputs():
    tuned = load_config(
        ["trainer=dpo", "model=qwen3_tiny", "outputs_dir=elsewhere", "infra.threads=1", "data.split_seed=7"]
    )
    base = base_of(tuned, [], "train")()
    assert (base.model, base.infra, base.tracking, base.outputs_dir) == (
        tuned.model,
        tuned.infra,
        tuned.tracking,
        "elsewhere",
    )
    assert (base.trainer.kind, base.data.kind, base.data.split_seed) == ("pretrain", "text", 7)
    assert base.name == "qwen3_tiny-pretrain"


def test_base_that_does_not_fit_the_model_says_why():
    tuned = load_config(
        ["trainer=dpo", "model=qwen3_tiny", "model.max_position_embeddings=128", "trainer.sequence_tokens=128"]
    )
    with pytest.raises(
        ConfigError, match=r"the pretraining that trainer.init_from=latest needs: trainer.sequence_tokens=256"
    ):
        base_of(tuned, [], "train")()


def test_commands_are_listed_and_dispatched(capsys: pytest.CaptureFixture[str]):
    assert llmtrain(["--help"]) == 0
    assert "  train   " in capsys.readouterr().out
    assert llmtrain(["train", "--cfg", "job", "-p", "name", "name=mine"]) == 0
    assert capsys.readouterr().out == "mine\n"


def test_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]):
    assert llmtrain(["trian"]) == 2
    assert capsys.readouterr().err.startswith("trian: no such command; did you mean 'train'?")


def test_check_judges_one_command_line(capsys: pytest.CaptureFixture[str]):
    assert llmtrain(["check", "model=qwen3_tiny", "trainer=dpo"]) == 0
    assert capsys.readouterr().out == "good: qwen3_tiny-dpo\n"
    assert llmtrain(["check", "model=qwen3_tiny", "trainer.lrr=1"]) == 2
    assert "did you mean 'trainer.lr'?" in capsys.readouterr().err


def test_check_goes_through_every_option_and_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "mine.yaml").write_text("defaults: [mlflow]\nurl: x\n")
    assert llmtrain(["check", "--config-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "good  trainer=dpo" in printed.out.splitlines()
    assert "wrong tracking=mine" in printed.out.splitlines()
    assert "tracking=mine: tracking.url: no such setting; did you mean 'tracking.uri'?" in printed.err
    assert printed.out.splitlines()[-1].endswith("options, 1 problem")
