"""The whole of `serve.yaml` and of `optimise.yaml`: a model by name, and what is done with it."""

from typing import Annotated, Literal

from pydantic import model_validator

from llmtrain.config.base import Changes, Settings
from llmtrain.config.environment import Environment
from llmtrain.config.infra import Infra
from llmtrain.config.launch import LocalLaunch
from llmtrain.config.optimise import Optimise
from llmtrain.config.serving import Serving
from llmtrain.config.tracking import Tracking


class OfAModel(Settings):
    """A command about a model that is there: everything about the model itself comes from its own record."""

    schema_version: Annotated[Literal[5], Changes.SURFACE]
    """Version of this schema."""
    version: Annotated[str | None, Changes.MATHEMATICS]
    """A registered model: `name@1.2.0`, `name@alias`, or `name` for the newest."""
    run: Annotated[str | None, Changes.MATHEMATICS]
    """A finished run's directory, or a model's; instead of `version`."""
    outputs_dir: Annotated[str, Changes.SURFACE]
    """Where runs, models and the registry are."""
    infra: Infra
    environment: Environment

    @model_validator(mode="after")
    def names_one_model(self) -> "OfAModel":
        if (self.version is None) == (self.run is None):
            raise ValueError(
                "name one model: version=NAME@VERSION (`llmtrain models` lists them), or run=outputs/NAME/RUN_ID"
            )
        if not isinstance(self.infra.launch, LocalLaunch):
            raise ValueError(
                f"this command works on the machine that it is typed on, but infra.launch.kind is "
                f"{self.infra.launch.kind}; set infra=local_cpu or infra=local_gpu, and start it there"
            )
        return self


class ServeConfig(OfAModel):
    """Everything that `serve.py` needs to know."""

    serving: Serving
    tracking: Tracking


class OptimiseConfig(OfAModel):
    """Everything that `llmtrain optimise` needs to know."""

    optimise: Optimise
