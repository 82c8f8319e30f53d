"""Every error llmtrain raises on purpose, with the exit code its process ends with.

LLMTrainError
├── UserError               2   the command, the config or an input file is wrong; the message says what to do next
│   ├── ConfigError             one or many settings are wrong: `problems` lists them all
│   ├── DataError               a source is missing, empty, undecodable, or has too many bad records
│   ├── TokenizerMismatch       the tokenizer does not fit the model or the data
│   ├── CheckpointMismatch      a checkpoint or a version belongs to another model
│   ├── UnsupportedModel        the architecture fails the log-probability check on load
│   └── RequestRefused          an endpoint says that the request is wrong (HTTP 4xx)
├── RunFailed               3   the run itself went wrong
│   ├── NonFiniteLoss           the loss or the gradient is NaN or infinite
│   ├── IntegrityError          a stored file no longer matches its recorded hash
│   ├── EngineFailed            an engine answered with HTTP 5xx, broke off a stream, or ended
│   ├── NotTheSameModel         the parity gate: what is served computes something else than what was trained
│   └── NotBetter               another form of a model is neither faster nor smaller here, or not good enough
├── TryAgain               75   nothing is wrong with the request: preempted (SIGTERM), disk full, lock held
│   └── EngineUnavailable       an endpoint cannot be reached, is busy, or is not ready
└── Interrupted           130   Ctrl-C; the state was saved
"""


class LLMTrainError(Exception):
    """Base of all; `exit_code` is what the process ends with."""

    exit_code = 3


class UserError(LLMTrainError):
    exit_code = 2


class ConfigError(UserError):
    """Settings are wrong.

    `problems` holds one line for each, in the order of the config; a line names the setting, what is wrong, its origin
    (file and line, or the override) and what to write instead.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the config:\n" + "\n".join(f"  {problem}" for problem in problems))


class DataError(UserError):
    pass


class TokenizerMismatch(UserError):
    pass


class CheckpointMismatch(UserError):
    pass


class UnsupportedModel(UserError):
    pass


class RequestRefused(UserError):
    """`status` is HTTP's, `code` the endpoint's own word for the reason, if it gave one."""

    def __init__(self, message: str, status: int, code: str | int | None) -> None:
        self.status = status
        self.code = code
        super().__init__(message)


class RunFailed(LLMTrainError):
    exit_code = 3


class NonFiniteLoss(RunFailed):
    pass


class IntegrityError(RunFailed):
    pass


class EngineFailed(RunFailed):
    pass


class NotTheSameModel(RunFailed):
    pass


class NotBetter(RunFailed):
    pass


class TryAgain(LLMTrainError):
    exit_code = 75


class EngineUnavailable(TryAgain):
    pass


class Interrupted(LLMTrainError):
    exit_code = 130
