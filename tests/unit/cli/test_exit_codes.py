"""What a command's errors become."""

import errno
import subprocess
import sys

import pytest

from llmtrain.cli import exits
from llmtrain.errors import ConfigError, Interrupted, LLMTrainError, NonFiniteLoss, TryAgain


def raising(error: BaseException):
    @exits
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["lr: too high"]), 2),
        (NonFiniteLoss("step 3"), 3),
        (TryAgain("lock"), 75),
        (Interrupted("saved"), 130),
    ],
)
def test_our_errors_give_their_message_and_their_code(
    error: LLMTrainError, code: int, capsys: pytest.CaptureFixture[str]
):
    assert raising(error)([]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"{error}\n")


def test_control_c_gives_130_without_traceback(capsys: pytest.CaptureFixture[str]):
    assert raising(KeyboardInterrupt())([]) == 130
    assert capsys.readouterr().err == ""


def test_a_full_disk_asks_to_try_again(capsys: pytest.CaptureFixture[str]):
    assert raising(OSError(errno.ENOSPC, "No space left on device", "outputs/a"))([]) == 75
    assert capsys.readouterr().err == "the disk is full: outputs/a; free some space and type the command again\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())([])
    with pytest.raises(PermissionError):
        raising(PermissionError(errno.EACCES, "no"))([])


def test_a_reader_that_goes_away_ends_the_command_quietly():
    code = """
import sys
from llmtrain.cli import exits
sys.exit(exits(lambda argv: print("x\\n" * 100_000) or 0)([]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141
