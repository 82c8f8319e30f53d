"""`llmtrain chat` before its page is there: what is refused, with which exit code."""

import socket
import subprocess
import sys

import pytest

from llmtrain.cli.chat import main
from tests.unit.ui.endpoint import Endpoint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("localhost:8000", "localhost:8000: no address of an endpoint; write it like http://127.0.0.1:8000"),
        ("--host 0.0.0.0", "--host: got '0.0.0.0', wants 127.0.0.1 or another IPv4 address of loopback"),
        ("--host here", "--host: got 'here', wants 127.0.0.1"),
        ("--port 65536", "--port: got '65536', wants a number from 0 to 65535"),
        ("--port http", "--port: got 'http', wants a number from 0 to 65535"),
        (
            "--api-key-env NO_SUCH_KEY",
            "--api-key-env: there is no environment variable NO_SUCH_KEY; `export NO_SUCH_KEY=",
        ),
        ("--share", "--share: no such flag"),
    ],
)
def test_mistakes_on_the_command_line_are_two(line: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_endpoint_that_is_away_is_75(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert main([url, "--no-browser"]) == 75
    told = capsys.readouterr().err
    assert told.startswith(f"{url} does not answer")
    assert told.endswith("is it running? `python serve.py` starts it\n")


def test_a_port_that_is_taken_is_two(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    port = endpoint.url.rpartition(":")[2]
    assert main([endpoint.url, "--port", port, "--no-browser"]) == 2
    assert capsys.readouterr().err == (
        f"cannot listen on 127.0.0.1:{port} (Address already in use); --port 0 takes a free one\n"
    )


def test_without_gradio_the_command_names_the_extra(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "llmtrain.ui.page", raising=False)
    assert main([endpoint.url, "--port", "0", "--no-browser"]) == 2
    assert capsys.readouterr().err == (
        "the page needs Gradio, which is not installed; run `pip install 'llmtrain[chat]'`\n"
    )


def test_help_loads_neither_gradio_nor_the_client():
    program = (
        "import sys; from llmtrain.cli.chat import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('gradio', 'httpx', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llmtrain chat [FLAG] [URL] ...")
