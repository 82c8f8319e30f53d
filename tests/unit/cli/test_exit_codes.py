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


@pytest.mark.parametrize(
    ("number", "code", "fact", "remedy"),
    [
        (errno.ENOSPC, 75, "the disk is full", "Free some space and run the same command again; what is saved stays"),
        (errno.EROFS, 2, "the file system is read-only", "Make it writable, or choose another place"),
        (errno.EACCES, 2, "permission denied", "Change its permissions, or choose another place"),
        (errno.ENOTDIR, 2, "a file stands where a directory is needed", "Move it away, or choose another place"),
    ],
)
def test_what_the_machine_says_about_a_file_gets_the_place_and_the_next_step(
    number: int, code: int, fact: str, remedy: str, capsys: pytest.CaptureFixture[str]
):
    assert raising(OSError(number, "in the system's words", "outputs/a"))([]) == code
    assert capsys.readouterr().err.startswith(f"outputs/a: {fact}\n{remedy}")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())([])
    with pytest.raises(FileNotFoundError):
        raising(FileNotFoundError(errno.ENOENT, "no"))([])


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
