"""`tracking=`: who, besides `metrics.jsonl`, is told the metrics."""

from typing import Annotated, Literal

from pydantic import Discriminator

from llmtrain.config.base import Changes, Settings


class MLflowTracking(Settings):
    """An MLflow tracking server or database."""

    kind: Annotated[Literal["mlflow"], Changes.SURFACE]
    uri: Annotated[str | None, Changes.SURFACE]
    """MLflow tracking URI; null is the SQLite file in `outputs_dir`, which also holds the model registry."""


class NoTracking(Settings):
    """`metrics.jsonl` only."""

    kind: Annotated[Literal["none"], Changes.SURFACE]


Tracking = Annotated[MLflowTracking | NoTracking, Discriminator("kind")]
