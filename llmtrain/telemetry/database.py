"""The MLflow database of an outputs directory: `mlflow/mlflow.db`, with artifacts as files in `mlflow/artifacts`.

Nothing in it is an absolute path, so that outputs may be moved or copied as a whole. To look at it:
`mlflow server --backend-store-uri sqlite:///outputs/mlflow/mlflow.db --artifacts-destination outputs/mlflow/artifacts`.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import UserError
from llmtrain.files import fsync

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACT_ROOT = "mlflow-artifacts:/"
"""Where MLflow believes artifacts to be; its server resolves this to `--artifacts-destination`."""


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

    Raises UserError where the file is not a database of this MLflow version.
    """
    path = database_path(outputs.absolute())
    with locked(outputs):
        if not path.exists():
            print(f"{path}: first use, creating the tracking database takes some seconds", file=sys.stderr, flush=True)
            _create(path)
    try:
        return open_client(_sqlite_uri(path))
    except failures() as error:
        raise UserError(
            f"{path} cannot be opened: {str(error).splitlines()[0]}\nIf another version of MLflow wrote it, copy it "
            f"away and run: mlflow db upgrade '{_sqlite_uri(path)}'. If it is damaged, restore it from a backup."
        ) from error


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
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds; training waits that long
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # what failed is sent again with a later row


def _sqlite_uri(path: Path) -> str:
    from sqlalchemy import URL

    return str(URL.create("sqlite", database=str(path)))
