"""`infra.launch`: who starts a run's processes, where, and what happens when they are stopped from outside."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import Discriminator, model_validator

from llmtrain.config.base import Added, Changes, Settings

Parallel = Annotated[int | None, Gt(0), Changes.SURFACE]
Restarts = Annotated[int, Ge(0), Changes.SURFACE]


class LocalLaunch(Settings):
    """This machine. A command trains in the foreground, a sweep's runs one after the other; `--detach` leaves them to a
    process of its own."""

    kind: Annotated[Literal["local"], Changes.SURFACE, Added(4, "local")]
    parallel: Annotated[int, Gt(0), Changes.SURFACE, Added(4, 1)]
    """Runs of a detached sweep at the same time."""
    restarts: Annotated[Restarts, Added(4, 3)]
    """Starts in a row that a detached run may end with exit code 75 without a new checkpoint, before it is given up."""


class SlurmLaunch(Settings):
    """A Slurm cluster, through Submitit. The outputs directory must be the same path on every node."""

    kind: Annotated[Literal["slurm"], Changes.SURFACE]
    partition: Annotated[str | None, Changes.SURFACE]
    """Partition; null is the cluster's default."""
    account: Annotated[str | None, Changes.SURFACE]
    """Whom the hours are charged to; null is the user's default."""
    qos: Annotated[str | None, Changes.SURFACE]
    """Quality of service; null is the default one."""
    nodes: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Machines that a run takes; `infra.ranks` are shared out evenly over them."""
    gpus_per_rank: Annotated[int, Ge(0), Changes.PERFORMANCE]
    """GPUs reserved for each rank, of which it uses one; 0 on machines without."""
    gpu_type: Annotated[str | None, Changes.PERFORMANCE]
    """Type of GPU as the cluster's `--gres` names it; null takes any."""
    cpus_per_rank: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """CPU cores of each rank."""
    memory_gib_per_node: Annotated[int | None, Gt(0), Changes.PERFORMANCE]
    """Memory of each node, in GiB; null is the cluster's default."""
    minutes: Annotated[int, Gt(0), Changes.SURFACE]
    """Time limit of one start. A run that has not ended by then saves, is requeued and goes on."""
    grace_seconds: Annotated[int, Gt(0), Changes.SURFACE]
    """How long before the time limit, or at a preemption before its GraceTime ends, the run is told to save (SIGUSR2);
    longer than a step and a save together."""
    parallel: Parallel
    """Runs of a sweep at the same time; null is as many as the cluster lets in."""
    restarts: Restarts
    """Starts in a row that may end without a new checkpoint, before the run is given up."""
    options: Annotated[tuple[str, ...], Changes.SURFACE]
    """Further options of sbatch without the dashes, such as `constraint=a100` or `exclude=node7`."""
    setup: Annotated[tuple[str, ...], Changes.SURFACE]
    """Shell lines before the run starts, such as `module load cuda`."""


class RayLaunch(Settings):
    """A Ray cluster that is up. The outputs directory must be the same path on every node."""

    kind: Annotated[Literal["ray"], Changes.SURFACE]
    address: Annotated[str, Changes.SURFACE]
    """The head's dashboard, where jobs are submitted, such as `http://127.0.0.1:8265`."""
    cpus_per_rank: Annotated[float, Gt(0), Changes.PERFORMANCE]
    """CPU cores that Ray counts for each rank; may be a fraction, so that runs share a core."""
    gpus_per_rank: Annotated[float, Ge(0), Changes.PERFORMANCE]
    """GPUs that Ray counts for each rank; may be a fraction, so that runs share a GPU."""
    parallel: Parallel
    """Runs of a sweep at the same time; null is as many as fit."""
    restarts: Restarts
    """Starts in a row that may end without a new checkpoint, before the run is given up."""

    @model_validator(mode="after")
    def shares_are_rays(self) -> "RayLaunch":
        for name in ("cpus_per_rank", "gpus_per_rank"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise ValueError(f"{name}={value}: Ray shares out parts of one only; set it to {int(value + 1)}")
        return self


class AKSLaunch(Settings):
    """A Kubernetes cluster, as Azure's AKS: one Job a run, or one JobSet."""

    kind: Annotated[Literal["aks"], Changes.SURFACE]
    context: Annotated[str | None, Changes.SURFACE]
    """Context of the kubeconfig; null is the current one."""
    namespace: Annotated[str, Changes.SURFACE]
    """Namespace of jobs, volume claim and service account."""
    image: Annotated[str | None, Changes.SURFACE]
    """Container image with this llmtrain, by digest or an exact tag, never `latest`; null plans, but cannot submit."""
    node_pool: Annotated[str | None, Changes.SURFACE]
    """Node pool to run in (label `agentpool`); null is any that fits."""
    spot: Annotated[bool, Changes.SURFACE]
    """Run on spot nodes, which may be taken away; the run comes back and goes on."""
    nodes: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Machines that a run takes; `infra.ranks` are shared out evenly over them."""
    job_set: Annotated[bool, Changes.SURFACE]
    """Make a JobSet of a run of several machines, which starts them again all at once; needs its controller in the
    cluster. Without, they are an Indexed Job."""
    gpus_per_rank: Annotated[int, Ge(0), Changes.PERFORMANCE]
    """GPUs of each rank; 0 on nodes without."""
    cpus_per_rank: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """CPU cores requested for each rank."""
    memory_gib_per_rank: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Memory requested for each rank, which is its limit too, in GiB."""
    shared_memory_gib: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """/dev/shm of each pod, in GiB, out of its memory: NCCL and data loaders use it."""
    outputs_claim: Annotated[str, Changes.SURFACE]
    """PersistentVolumeClaim (blob-csi or Azure Files, ReadWriteMany) that holds the outputs directory."""
    outputs_mount: Annotated[str, Changes.SURFACE]
    """Where that volume is mounted in the pods."""
    service_account: Annotated[str, Changes.SURFACE]
    """Service account, federated with a workload identity that may read data and write models."""
    secret: Annotated[str | None, Changes.SURFACE]
    """Secret whose entries become environment variables (tracker keys, HF_TOKEN); null takes none."""
    queue: Annotated[str | None, Changes.SURFACE]
    """Kueue LocalQueue that admits the jobs; null where the cluster has no Kueue."""
    hours: Annotated[float, Gt(0), Changes.SURFACE]
    """Longest life of a job, its restarts included; with `job_set` of each of its starts. In hours."""
    grace_seconds: Annotated[int, Gt(0), Changes.SURFACE]
    """terminationGracePeriodSeconds: longer than a step and a save together."""
    restarts: Restarts
    """Starts that may end with exit code 75, before the job has failed; evictions do not count."""
    keep_seconds: Annotated[int, Ge(0), Changes.SURFACE]
    """How long a finished job stays listed in the cluster (ttlSecondsAfterFinished)."""
    cost_centre: Annotated[str, Changes.SURFACE]
    """Value of the label by which the cluster's cost is shared out."""
    parallel: Parallel
    """Runs of a sweep at the same time; null is as many as the cluster lets in. Jobs do not wait for each other: a
    number needs somebody who submits no more at once, such as a search's controller."""

    @model_validator(mode="after")
    def image_is_exact(self) -> "AKSLaunch":
        name, _, tag = (self.image or "").rpartition("/")[2].partition(":")
        if self.image is not None and "@sha256:" not in self.image and (not name or tag in ("", "latest")):
            raise ValueError(
                f"image={self.image} is another image tomorrow, and a run that comes back must be the same; set "
                f"infra.launch.image to a digest (REGISTRY/llmtrain@sha256:...) or an exact tag (REGISTRY/llmtrain:0.5)"
            )
        return self

    @model_validator(mode="after")
    def a_set_has_several_machines(self) -> "AKSLaunch":
        if self.job_set and self.nodes == 1:
            raise ValueError(
                "job_set=true, but nodes=1: a run of one machine is one Job, which Kubernetes starts again by itself; "
                "set infra.launch.job_set=false, or infra.launch.nodes"
            )
        return self

    @model_validator(mode="after")
    def names_are_names(self) -> "AKSLaunch":
        for key in ("namespace", "node_pool", "outputs_claim", "service_account", "secret", "queue"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value):
                raise ValueError(
                    f"{key}={value} is no name in Kubernetes (lower case, digits and dashes, at most 63); "
                    f"set infra.launch.{key}"
                )
        if not re.fullmatch(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?", self.cost_centre):
            raise ValueError(
                f"cost_centre={self.cost_centre} is no value of a label (letters, digits, - . _, at most 63); "
                f"set infra.launch.cost_centre"
            )
        if not re.fullmatch(r"(/[-._A-Za-z0-9]+)+", self.outputs_mount):
            raise ValueError(
                f"outputs_mount={self.outputs_mount} is no absolute path; set infra.launch.outputs_mount=/outputs"
            )
        return self


Launch = Annotated[LocalLaunch | SlurmLaunch | RayLaunch | AKSLaunch, Discriminator("kind")]
