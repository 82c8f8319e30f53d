"""The MLflow database of an outputs directory: `mlflow/mlflow.db`, with artifacts as files in `mlflow/artifacts`.

Nothing in it is an absolute path, so that outputs may be moved or copied as a whole. To look at it:
`mlflow server --backend-store-uri sqlite:///outputs/mlflow/mlflow.db --artifacts-destination outputs/mlflow/artifacts`.
"""

import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain import files
from llmtrain.errors import LLMTrainError, TryAgain, UserError
from llmtrain.files import fsync

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACT_ROOT = "mlflow-artifacts:/"
"""Where MLflow believes artifacts to be; its server resolves this to `--artifacts-destination`."""

SQLITE_SAYS = re.compile(r"\(sqlite3\.\w+\) (.+)")
"""What SQLAlchemy's errors, and MLflow's around them, quote."""


def database_path(outputs: Path) -> Path:
    return outputs / "mlflow" / "mlflow.db"


def artifacts_directory(outputs: Path) -> Path:
    """What `ARTIFACT_ROOT` stands for."""
    return outputs / "mlflow" / "artifacts"


@contextmanager
def locked(outputs: Path) -> Iterator[None]:
    """Hold the lock of the database among this machine's processes; it is not re-entrant."""
    directory = database_path(outputs).parent
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_client(uri: str) -> "MlflowClient":
    """A client of any tracking URI."""
    _quieten()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_database(outputs: Path) -> "MlflowClient":
    """A client of the database of `outputs`, which is created (some seconds, said in one line) where there is none.

    Raises UserError where the file is not a database of this MLflow version, and as `in_words` does.
    """
    path = database_path(outputs.absolute())
    if not path.exists():
        with in_words(outputs), locked(outputs):
            if not path.exists():
                print(f"{path}: first use, creating the tracking database takes some seconds", file=sys.stderr)
                _create(path)
    with in_words(outputs):
        try:
            return open_client(_sqlite_uri(path))
        except failures() as error:
            if SQLITE_SAYS.search(str(error)):
                raise
            raise _unusable(path, str(error).splitlines()[0]) from error


@contextmanager
def in_words(outputs: Path) -> Iterator[None]:
    """Raise what SQLite says in the block as TryAgain (locked, no room) or UserError (not writable, damaged)."""
    try:
        yield
    except failures() as error:
        path = database_path(outputs.absolute())
        said = SQLITE_SAYS.search(str(error))
        if words := files.in_words(error, path) or (_in_words(said[1], path) if said else None):
            raise words from error
        raise


def _in_words(said: str, path: Path) -> LLMTrainError:
    again = "and run the same command again; what is saved stays"
    if "locked" in said:
        return TryAgain(f"{path} is locked by another process\nWait for it, or stop it, {again}")
    if "disk is full" in said or "disk I/O error" in said:
        return TryAgain(f"{path}: {said}\nFree some space, or raise the limit `ulimit -f`, {again}")
    if "readonly" in said or "unable to open" in said:
        return UserError(f"{path}: {said}\nMake it and its directory writable, or choose another outputs_dir")
    return _unusable(path, said)


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be opened: {reason}\nIf another version of MLflow wrote it, copy it away and run: mlflow db "
        f"upgrade '{_sqlite_uri(path)}'. If it is damaged, restore it from a backup, or move it away: a new one is "
        f"made, without the versions that were registered in this one"
    )


def failures() -> tuple[type[Exception], ...]:
    """What MLflow raises when its database or server is away: to be caught where work can go on without it."""
    _quieten()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def _create(path: Path) -> None:
    """Migrate an empty database aside and rename it: a kill in the middle leaves none rather than half of one."""
    aside = path.with_name(f"{path.name}.writing")
    aside.unlink(missing_ok=True)
    _quieten()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(_sqlite_uri(aside), ARTIFACT_ROOT)
    store.engine.dispose()
    fsync(aside)
    aside.rename(path)
    fsync(path.parent)


def _quieten() -> None:
    """No usage reports, no chatter, no minutes of retries. MLflow reads the first two when it is imported."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # its errors come as exceptions: told here, in words
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds; training waits that long
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # what failed is sent again with a later row


def _sqlite_uri(path: Path) -> str:
    from sqlalchemy import URL

    return str(URL.create("sqlite", database=str(path)))
