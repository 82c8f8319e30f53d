"""The Kubernetes objects of a run: a Job and, where it takes several machines, the Service by which they meet.

A Job's name is a function of the run, so that submitting twice makes one. Who stops a pod decides what it costs: a pod
that was evicted comes back for nothing, one that asks for another start (exit code 75) uses up one of `restarts`, and
an end that another start would only repeat fails the Job at once.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from kubernetes import client as k8s

from llmtrain.config.launch import AKSLaunch
from llmtrain.errors import Interrupted, RunFailed, TryAgain, UserError
from llmtrain.launch.engine import Run

CONTAINER = "llmtrain"
MANAGED = {"app.kubernetes.io/name": "llmtrain", "app.kubernetes.io/managed-by": "llmtrain"}
"""Labels of everything that is made here, by which it is found again."""
RUN = "llmtrain/run"
"""Annotation: the run's directory, relative to outputs."""
USER = 1000
"""The user and group that pods run as, and that must be able to write the outputs."""
HOME = "/home/llmtrain"
PORT = 29500
"""Where the ranks of several machines meet, on the first one."""
NOT_AGAIN = (1, UserError.exit_code, RunFailed.exit_code, Interrupted.exit_code)
"""Exit codes that another start would only repeat; 1 is a mistake of ours."""
SPOT = "kubernetes.azure.com/scalesetpriority"
"""Label and taint that AKS puts on spot nodes."""


@dataclass(frozen=True)
class Manifest:
    """What is created for one run."""

    job: k8s.V1Job
    service: k8s.V1Service | None

    @property
    def name(self) -> str:
        name: str = self.job.metadata.name
        return name

    def as_yaml(self) -> str:
        """Documents as `kubectl apply` takes them."""
        objects = [self.job] if self.service is None else [self.service, self.job]
        return "".join(f"---\n{yaml.safe_dump(as_data(item), sort_keys=False, width=120)}" for item in objects)


def as_data(item: Any) -> dict[str, Any]:
    """A typed object as the API takes it."""
    data: dict[str, Any] = k8s.ApiClient(k8s.Configuration()).sanitize_for_serialization(item)
    return data


def manifest(run: Run, launch: AKSLaunch, sweep_id: str) -> Manifest:
    """The objects of `run`, submitted as part of a sweep. Raises UserError where the settings make none."""
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
    name = job_name(run)
    labels = {
        **MANAGED,
        "llmtrain/experiment": _slug(run.frozen.config.name)[:63].rstrip("-"),
        "llmtrain/run-id": run.frozen.run_id,
        "llmtrain/sweep": sweep_id,
        "cost-centre": launch.cost_centre,
    }
    several = launch.nodes > 1
    spec = k8s.V1JobSpec(
        backoff_limit=launch.restarts * launch.nodes,
        completions=launch.nodes,
        parallelism=launch.nodes,
        completion_mode="Indexed" if several else "NonIndexed",
        active_deadline_seconds=round(launch.hours * 3600),
        ttl_seconds_after_finished=launch.keep_seconds,
        pod_failure_policy=_failure_policy(),
        pod_replacement_policy="Failed",  # never two pods on one run: the old one has ended before the new one begins
        suspend=True if launch.queue else None,  # Kueue starts it
        template=_pod(run, launch, name, labels, ranks),
    )
    queue = {"kueue.x-k8s.io/queue-name": launch.queue} if launch.queue else {}
    metadata = k8s.V1ObjectMeta(
        name=name,
        namespace=launch.namespace,
        labels={**labels, **queue},
        annotations={RUN: relative_directory(run)},
    )
    job = k8s.V1Job(api_version="batch/v1", kind="Job", metadata=metadata, spec=spec)
    return Manifest(job, _meeting_place(name, launch.namespace, labels) if several else None)


def job_name(run: Run) -> str:
    """The name of the run's Job, which is a valid name of a host and of a Service too."""
    return f"llmtrain-{_slug(run.frozen.config.name)[:30].rstrip('-')}-{run.frozen.run_id}"


def relative_directory(run: Run) -> str:
    """The run's directory as the pods see it under their mount."""
    return f"{run.directory.parent.name}/{run.directory.name}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def _pod(run: Run, launch: AKSLaunch, name: str, labels: dict[str, str], ranks: int) -> k8s.V1PodTemplateSpec:
    mount = launch.outputs_mount
    container = k8s.V1Container(
        name=CONTAINER,
        image=launch.image,
        command=["python", "-m", "llmtrain.launch.work", f"{mount}/{relative_directory(run)}", "aks", name],
        env=_environment(launch, name),
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
        subdomain=name if launch.nodes > 1 else None,
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


def _environment(launch: AKSLaunch, name: str) -> list[k8s.V1EnvVar]:
    """Where libraries may write, and where ranks meet; each pod has its JOB_COMPLETION_INDEX from Kubernetes."""
    values = {
        "HOME": HOME,
        "HF_HOME": f"{launch.outputs_mount}/cache/huggingface",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if launch.nodes > 1:
        values |= {"MASTER_ADDR": f"{name}-0.{name}", "MASTER_PORT": str(PORT)}
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


def _failure_policy() -> k8s.V1PodFailurePolicy:
    """The first rule that fits decides; a pod that fits none (killed for its memory, say) counts as 75 does."""
    rule, codes = k8s.V1PodFailurePolicyRule, k8s.V1PodFailurePolicyOnExitCodesRequirement
    evicted = k8s.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    in_vain = codes(container_name=CONTAINER, operator="In", values=list(NOT_AGAIN))
    again = codes(container_name=CONTAINER, operator="In", values=[TryAgain.exit_code])
    return k8s.V1PodFailurePolicy(
        rules=[
            rule(
                action="Ignore", on_pod_conditions=[evicted]
            ),  # first: whatever it ended with, it did not end by itself
            rule(action="FailJob", on_exit_codes=in_vain),
            rule(action="Count", on_exit_codes=again),
        ]
    )


def _meeting_place(name: str, namespace: str, labels: dict[str, str]) -> k8s.V1Service:
    """A Service without an address of its own: it only gives each pod of the Job a name."""
    return k8s.V1Service(
        api_version="v1",
        kind="Service",
        metadata=k8s.V1ObjectMeta(name=name, namespace=namespace, labels=labels),
        spec=k8s.V1ServiceSpec(
            cluster_ip="None",
            publish_not_ready_addresses=True,  # ranks look for each other before any is ready
            selector={"batch.kubernetes.io/job-name": name},
            ports=[k8s.V1ServicePort(name="ranks", port=PORT)],
        ),
    )
