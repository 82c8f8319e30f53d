"""One short file per command. `exits` gives them all the same exit codes."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec

from llmtrain.errors import Interrupted, LLMTrainError, UserError
from llmtrain.files import in_words

Arguments = ParamSpec("Arguments")


def exits(command: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Turn the errors that llmtrain raises on purpose, and the machine's own, into a message and an exit code.

    A full disk is TryAgain (75), a file that may not be read or written UserError (2), Ctrl-C is Interrupted (130), a
    reader that has gone away (`| head`) ends quietly with 141, as the shell reports SIGPIPE. Anything else is our
    mistake: it keeps its traceback and ends with 1.
    """

    @functools.wraps(command)
    def with_exit_code(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except LLMTrainError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return Interrupted.exit_code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
            return 128 + signal.SIGPIPE
        except OSError as error:
            words = in_words(error)
            if words is None:
                raise
            print(words, file=sys.stderr)
            return words.exit_code
        return code

    return with_exit_code


class UsageError(UserError):
    """The command line has a flag or a command that does not exist."""
