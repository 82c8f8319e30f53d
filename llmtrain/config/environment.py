"""`environment=`: whose storage, tracking and registry a run uses, and what may be submitted there."""

from typing import Annotated, Literal

from annotated_types import Gt

from llmtrain.config.base import Added, Changes, Settings


class Environment(Settings):
    """Addresses and policies; the policies are checked where runs are submitted."""

    name: Annotated[Literal["dev", "staging", "prod"], Changes.SURFACE, Added(4, "dev")]
    """What it is called."""
    outputs_dir: Annotated[str, Changes.SURFACE, Added(4, "outputs")]
    """What `outputs_dir` is by default."""
    tracking_uri: Annotated[str | None, Changes.SURFACE, Added(4, None)]
    """What `tracking.uri` is by default: the MLflow server that also holds the model registry."""
    committed_code: Annotated[bool, Changes.SURFACE, Added(4, False)]
    """Refuse to submit from a checkout that has changes which are not committed."""
    force: Annotated[bool, Changes.SURFACE, Added(4, True)]
    """Whether `--force` may submit what will not fit into memory by its plan."""
    device_hours: Annotated[float | None, Gt(0), Changes.SURFACE, Added(4, None)]
    """Most hours of devices that the runs of one submission may take by their plans; null is no limit."""
