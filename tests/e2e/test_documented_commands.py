"""Every command of the README is run; what would take long gets a smaller model behind it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llmtrain.config.compose import Composer
from tests.e2e.conftest import Demo, shell
from tests.unit.diff.conftest import History, history

__all__ = ["history"]  # a fixture

README = (Path(__file__).parents[2] / "README.md").read_text()
SMALLER = "model=qwen3_tiny tracking=none trainer.warmup_tokens=1_000 trainer.log_every_tokens=5_000 "
TEXT = SMALLER + "trainer.budget_tokens=20_000"

pytestmark = pytest.mark.timeout(1800)


def commands(heading: str) -> list[str]:
    """The lines of the first code block under a heading, without their remarks."""
    block = re.search(rf"^## {heading}\n.*?```\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    return [re.sub(r"\s+#.*", "", line) for line in block[1].splitlines()]


@pytest.mark.parametrize("command", commands("Then")[1:])
def test_a_command_of_the_section_then(demo: Demo, command: str):
    done = shell(command, demo.directory)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("command", commands("Your own text and preferences"))
def test_a_command_on_own_data_is_valid(command: str):
    assert Composer().check(shlex.split(command)[2:]).problems == []


@pytest.mark.campaign
def test_own_text_and_own_preferences(demo: Demo):
    notes = demo.directory / "notes" / "deep"
    notes.mkdir(parents=True)
    for number in range(40):
        (notes / f"{number}.txt").write_text(
            f"Note {number} says that the sum of {number} and one is {number + 1}. " * 9
        )
    with (demo.directory / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(notes.iterdir()))
    with (demo.directory / "votes.jsonl").open("w") as file:
        for number in range(200):
            answers = {"chosen": f"It is {number + 1}.", "rejected": f"It is {number}, as far as I know."}
            file.write(json.dumps({"prompt": f"What is {number} and one?", **answers}) + "\n")
    with (demo.directory / "thumbs.jsonl").open("w") as file:
        for number in range(200):
            answer = {"completion": f"It is {number + number % 2}.", "label": bool(number % 2)}
            file.write(json.dumps({"prompt": f"What is {number} and one?", **answer}) + "\n")
    with (demo.directory / "chats.jsonl").open("w") as file:
        for number in range(200):
            said = zip(("user", "assistant"), (f"What is {number} and one?", f"It is {number + 1}."), strict=True)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    text, lines, votes, chats, smollm2, thumbs, distilled = commands("Your own text and preferences")
    for command in (f"{text} {TEXT}", f"{lines} {TEXT}"):
        done = shell(command, demo.directory)
        assert done.returncode == 0, done.stdout[-3000:]
    corpus = "'data.corpus={kind: files, paths: [notes/**/*.txt], licence: proprietary}'"
    done = shell(f"{votes} {SMALLER} {corpus}", demo.directory)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "trainer.init_from=latest is qwen3_tiny-pretrain@1.0.1" in done.stdout
    once = "trainer.epochs=1"
    distilled = distilled.replace("qwen3_small", "qwen3_tiny")
    few = "trainer.warmup_tokens=100 trainer.sample_tokens=4 tracking=none "
    for command in (
        f"{chats} {SMALLER} {corpus} {once}",
        f"{smollm2} {few} {corpus} {once}",
        f"{thumbs} {SMALLER} {corpus} {once}",
        f"{distilled} {TEXT} {corpus}",
    ):
        done = shell(command, demo.directory)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"


def test_serve(demo: Demo, repository: Path):
    """Both servers run at once, on ports of their own; the page answers; each ends well by SIGTERM."""
    (demo.directory / "serve.py").symlink_to(repository / "serve.py")
    ports = {number: str(free_port()) for number in ("8000", "8001")}
    torch_server, parity, optimise, onnx_server, chat = (
        re.sub("800[01]", lambda found: ports[found[0]], command) for command in commands("Serve")
    )
    with (
        running(f"exec {torch_server} serving.port={ports['8000']}", demo.directory, "is ready"),
        running(f"{optimise} && exec {onnx_server}", demo.directory, "is ready"),
        running(f"exec {chat} --port 0 --no-browser", demo.directory, "http://127.0.0.1:") as said,
    ):
        gate = shell(f"{parity} --probes 16", demo.directory)
        assert gate.returncode == 0, gate.stdout[-3000:]
        assert "the same" in gate.stdout
        pages = [
            url for url in re.findall(r"http://127\.0\.0\.1:\d+", said) if url.rpartition(":")[2] not in ports.values()
        ]
        assert "gradio" in httpx.get(pages[0]).text


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(command: str, directory: Path, ready: str) -> Iterator[str]:
    """What a command has said when it was ready; SIGTERM ends it, with 0 or by itself."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        ["bash", "-c", command], cwd=directory, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        try:
            for line in process.stdout:
                said += line
                if ready in line:
                    break
            assert ready in said, said
            yield said
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            rest = process.stdout.read()
            code = process.wait(60)
    assert code in (0, -signal.SIGTERM), said + rest


def test_what_a_change_changes(history: History):
    frozen = Path(__file__).parents[1] / "golden" / "frozen" / "v2-pretrain.json"
    for name in ("A", "B"):
        (history.top / "outputs" / "smoke" / name).mkdir(parents=True)
        (history.top / "outputs" / "smoke" / name / "config.json").write_bytes(frozen.read_bytes())
    history.git("checkout", "-q", "-b", "work")
    history.edit("conf/experiment/smoke.yaml", "budget_tokens: 100_000", "budget_tokens: 200_000")
    history.commit()
    runs, revisions, command_lines, pull_request = (
        shell(command, history.top) for command in commands("What a change changes")
    )
    assert [done.returncode for done in (runs, revisions, command_lines, pull_request)] == [0] * 4
    assert "nothing differs" in runs.stdout
    assert "trainer.budget_tokens  100000 -> 200000" in revisions.stdout
    assert "trainer.loss  sigmoid -> ipo" in command_lines.stdout
    assert "<!-- needs the label changes-mathematics -->" in pull_request.stdout


def test_the_readme_shows_what_a_typo_prints(demo: Demo):
    shown = re.search(r"^\$ (python train\.py .*?)\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert shown is not None
    done = shell(shown[1], demo.directory)
    assert done.returncode == 2
    assert done.stdout.strip() == shown[2].strip()


def test_the_readme_shows_what_explain_prints(repository: Path):
    shown = re.search(r"^\$ (llmtrain explain .*?)\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert shell(shown[1], repository).stdout.strip() == shown[2].strip()


def test_the_wheel_carries_conf_and_its_command_works_elsewhere(demo: Demo, repository: Path, tmp_path: Path):
    built = shell(f"python -m build --wheel --no-isolation --outdir {tmp_path} {repository}", tmp_path)
    assert built.returncode == 0, built.stdout[-3000:]
    place = tmp_path / "site"
    assert shell(f"python -m pip install -q --no-deps --target {place} {tmp_path}/*.whl", tmp_path).returncode == 0
    done = shell(f"PYTHONPATH={place} python -m llmtrain train --cfg job model=qwen3_tiny", tmp_path)
    assert "hidden_size: 64" in done.stdout
    where = shell(f"PYTHONPATH={place} python -c 'import llmtrain; print(llmtrain.__file__)'", tmp_path).stdout
    assert where.startswith(str(place))
    trained = shell(f"PYTHONPATH={place} {place}/bin/llmtrain train experiment=smoke tracking=none "
                    f"trainer.budget_tokens=20_000 trainer.warmup_tokens=1_000", tmp_path)  # fmt: skip
    assert trained.returncode == 0, trained.stdout[-3000:]
    (report,) = (tmp_path / "outputs" / "smoke").glob("*/report.html")
    assert "<svg" in report.read_text()
