"""The pods of a run on Kubernetes: what each machine runs, in which image, with what rights and volumes."""

from kubernetes import client as k8s

from llmtrain.config.launch import AKSLaunch
from llmtrain.errors import UserError
from llmtrain.launch.engine import Run

CONTAINER = "llmtrain"
USER = 1000
"""The user and group that pods run as, and that must be able to write the outputs."""
HOME = "/home/llmtrain"
PORT = 29500
"""Where the ranks of several machines meet, on the first one."""
SPOT = "kubernetes.azure.com/scalesetpriority"
"""Label and taint that AKS puts on spot nodes."""


def pod_template(run: Run, launch: AKSLaunch, labels: dict[str, str], name: str, first: str) -> k8s.V1PodTemplateSpec:
    """Of each machine of `run`, whose handle is `name`; `first` is the host name of the first machine. Raises UserError
    where the settings make none."""
    if launch.image is None:
        raise UserError(
            "infra.launch.image is not set: name the container image to run, by digest or exact tag, such as "
            "infra.launch.image=registry.azurecr.io/llmtrain@sha256:... (launchers/aks/README.md builds one)"
        )
    ranks = run.infra.ranks // launch.nodes
    if launch.shared_memory_gib >= launch.memory_gib_per_rank * ranks:
        raise UserError(
            f"infra.launch.shared_memory_gib={launch.shared_memory_gib} comes out of a pod's memory, which is "
            f"{launch.memory_gib_per_rank * ranks} GiB: lower it, or raise infra.launch.memory_gib_per_rank"
        )
    mount = launch.outputs_mount
    container = k8s.V1Container(
        name=CONTAINER,
        image=launch.image,
        command=["python", "-m", "llmtrain.launch.work", f"{mount}/{relative_directory(run)}", "aks", name],
        env=_environment(launch, first),
        env_from=[k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=launch.secret))] if launch.secret else None,
        resources=_resources(launch, ranks),
        security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            run_as_non_root=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        termination_message_policy="FallbackToLogsOnError",
        volume_mounts=[
            k8s.V1VolumeMount(name="outputs", mount_path=mount),
            k8s.V1VolumeMount(name="shared-memory", mount_path="/dev/shm"),
            k8s.V1VolumeMount(name="tmp", mount_path="/tmp"),
            k8s.V1VolumeMount(name="home", mount_path=HOME),
        ],
    )
    memory = k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=f"{launch.shared_memory_gib}Gi")
    claim = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=launch.outputs_claim)
    spec = k8s.V1PodSpec(
        restart_policy="Never",  # or the failure policy would not be asked
        termination_grace_period_seconds=launch.grace_seconds,
        service_account_name=launch.service_account,
        automount_service_account_token=False,  # workload identity mounts a token of its own
        enable_service_links=False,
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            fs_group_change_policy="OnRootMismatch",
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        node_selector=_node_selector(launch),
        tolerations=_tolerations(launch) or None,
        containers=[container],
        volumes=[
            k8s.V1Volume(name="outputs", persistent_volume_claim=claim),
            k8s.V1Volume(name="shared-memory", empty_dir=memory),
            k8s.V1Volume(name="tmp", empty_dir=k8s.V1EmptyDirVolumeSource()),
            k8s.V1Volume(name="home", empty_dir=k8s.V1EmptyDirVolumeSource()),
        ],
    )
    metadata = k8s.V1ObjectMeta(
        labels={**labels, "azure.workload.identity/use": "true"},
        annotations={"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},  # nobody moves it to save a node
    )
    return k8s.V1PodTemplateSpec(metadata=metadata, spec=spec)


def _environment(launch: AKSLaunch, first: str) -> list[k8s.V1EnvVar]:
    """Where libraries may write, and where ranks meet; each pod has its JOB_COMPLETION_INDEX from Kubernetes."""
    values = {
        "HOME": HOME,
        "HF_HOME": f"{launch.outputs_mount}/cache/huggingface",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if launch.nodes > 1:
        values |= {"MASTER_ADDR": first, "MASTER_PORT": str(PORT)}
    return [k8s.V1EnvVar(name=key, value=value) for key, value in values.items()]


def _resources(launch: AKSLaunch, ranks: int) -> k8s.V1ResourceRequirements:
    """Of a pod. Memory and GPUs are limits too; cores are not, so that idle ones are used."""
    hard = {"memory": f"{launch.memory_gib_per_rank * ranks}Gi"}
    if launch.gpus_per_rank:
        hard["nvidia.com/gpu"] = str(launch.gpus_per_rank * ranks)
    return k8s.V1ResourceRequirements(requests={"cpu": str(launch.cpus_per_rank * ranks), **hard}, limits=hard)


def _node_selector(launch: AKSLaunch) -> dict[str, str]:
    chosen = {"kubernetes.io/os": "linux"}
    if launch.node_pool:
        chosen["agentpool"] = launch.node_pool
    if launch.spot:
        chosen[SPOT] = "spot"
    return chosen


def _tolerations(launch: AKSLaunch) -> list[k8s.V1Toleration]:
    """Of the taints that keep others off spot and GPU nodes."""
    found = []
    if launch.spot:
        found.append(k8s.V1Toleration(key=SPOT, operator="Equal", value="spot", effect="NoSchedule"))
    if launch.gpus_per_rank:
        found.append(k8s.V1Toleration(key="sku", operator="Equal", value="gpu", effect="NoSchedule"))
        found.append(k8s.V1Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"))
    return found


def relative_directory(run: Run) -> str:
    """The run's directory as the pods see it under their mount."""
    return f"{run.directory.parent.name}/{run.directory.name}"
