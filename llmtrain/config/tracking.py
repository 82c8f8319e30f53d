"""`tracking=`: who, besides `metrics.jsonl`, is told the metrics."""

from typing import Annotated, Literal

from pydantic import Discriminator

from llmtrain.config.base import Changes, Settings


class MLflowTracking(Settings):
    """An MLflow tracking server or database."""

    kind: Annotated[Literal["mlflow"], Changes.SURFACE]
    uri: Annotated[str | None, Changes.SURFACE]
    """MLflow tracking URI; null is the SQLite file in `outputs_dir`, which also holds the model registry."""


class CometTracking(Settings):
    """A Comet experiment: on-line with an API key; without one, archives in `comet/` of the run's directory."""

    kind: Annotated[Literal["comet"], Changes.SURFACE]
    project: Annotated[str | None, Changes.SURFACE]
    """Comet project; null is Comet's own default."""
    workspace: Annotated[str | None, Changes.SURFACE]
    """Comet workspace; null is the default one of the key's owner."""
    api_key_env: Annotated[str, Changes.SURFACE]
    """Name of the environment variable that holds the API key; the key itself stands in no file."""


class MLflowCometTracking(Settings):
    """Both at once, each as it is alone; neither waits for the other."""

    kind: Annotated[Literal["mlflow_comet"], Changes.SURFACE]
    mlflow: MLflowTracking
    comet: CometTracking


class NoTracking(Settings):
    """`metrics.jsonl` only."""

    kind: Annotated[Literal["none"], Changes.SURFACE]


Tracking = Annotated[MLflowTracking | CometTracking | MLflowCometTracking | NoTracking, Discriminator("kind")]
