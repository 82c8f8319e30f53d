"""What TAB offers, asked as bash asks, and once in a real bash."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.cli.completion import candidates
from llmtrain.cli.train import main


@pytest.fixture(autouse=True)
def _in_the_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python train.py tra", "tracking. tracking= trainer. trainer="),
        ("python train.py trainer=", "trainer=distill trainer=dpo trainer=kto trainer=pretrain trainer=sft"),
        ("./train.py infra=local_c", "infra=local_cpu"),
        ("/usr/bin/python3 ./train.py +exper", "+experiment="),
        ("python train.py model=qwen3_tiny,qwen3_s", "model=qwen3_tiny,qwen3_small"),
        ("python train.py trainer.b", "trainer.batch_rows= trainer.budget_tokens="),
        ("python train.py trainer=dpo trainer.b", "trainer.batch_rows= trainer.beta="),
        ("python train.py trainr=x trainer=dpo trainer.be", "trainer.beta="),
        ("python train.py model.tokenizer.", "model.tokenizer.kind= model.tokenizer.vocab_size="),
        ("python train.py infra.deterministic=", "infra.deterministic=false infra.deterministic=true"),
        ("python train.py infra.threads=", "infra.threads=null"),
        ("python train.py data.corpus.kind=f", "data.corpus.kind=files"),
        ("python train.py trainer.lr=", "trainer.lr=0.004"),
        ("python train.py name=", "name=qwen3_small-pretrain"),
        ("python train.py --cfg ", "all hydra job"),
        ("python train.py --a", "--again"),
        ("llmtrain ex", "explain"),
        ("llmtrain train trainer=d", "trainer=distill trainer=dpo"),
        ("llmtrain explain tra", "tracking tracking. trainer trainer."),
        ("llmtrain explain trainer=dpo trainer.be", "trainer.beta"),
        ("llmtrain explain --j", "--json"),
        ("python train.py --config-dir ", ""),
        ("python train.py nothing.like", ""),
        ("python train.py --unheard_of x", ""),
        ("llmtrain unheard_of x", ""),
        ("llmtrain models x", ""),
        ("", ""),
    ],
)
def test_what_is_offered(line: str, offered: str):
    assert candidates(line) == offered.split()


def test_own_options_are_offered(tmp_path: Path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("defaults: [dpo]\n")
    assert candidates(f"python train.py --config-dir {tmp_path} trainer=m") == ["trainer=mine"]
    line = f"python train.py --config-dir {tmp_path} trainer=mine data=demo_dpo trainer.be"
    assert candidates(line) == ["trainer.beta="]


def test_other_shells_get_hydras_script(capsys: pytest.CaptureFixture[str]):
    assert main(["--shell-completion", "install=fish"]) == 0
    assert "function hydra_fish_completion" in capsys.readouterr().out


def typed_into_bash(install: str, keys: str, directory: Path) -> str:
    """The command line that bash has after `keys`, TAB among them; completion is installed as the README says."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TERM": "dumb",
        "HOME": str(directory),
    }
    ours, theirs = pty.openpty()
    bash = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=directory, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    printed = ""
    try:
        os.write(ours, f'eval "$({install} --shell-completion install=bash)"; echo ready-$?\r'.encode())
        while "ready-0\r" not in printed:
            printed += os.read(ours, 4096).decode()
        os.write(ours, f"{keys}'\x01echo line: '\r".encode())  # to the start of the line: print it, do not run it
        while not (found := re.search(r"^line: (.*)\r$", printed, re.MULTILINE)):
            printed += os.read(ours, 4096).decode()
    finally:
        bash.kill()
        bash.wait()
        os.close(ours)
    return found[1]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("python train.py exp\tsm\tmod\t=qwen3_t\t", "python train.py experiment=smoke model=qwen3_tiny "),
        ("python train.py trainer=dpo trainer.be\t0.2", "python train.py trainer=dpo trainer.beta=0.2"),
        ("python READ\t", "python README.md "),
        ("llmtrain tr\ttrainer=dp\ttrainer.be\t", "llmtrain train trainer=dpo trainer.beta="),
    ],
)
def test_tab_completes_in_a_real_bash(keys: str, line: str, repository: Path):
    install = "python train.py" if keys.startswith("python") else "llmtrain train"
    assert typed_into_bash(install, keys, repository) == line
