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
from llmtrain.launch.aks.pods import CONTAINER, PORT, pod_template, relative_directory
from llmtrain.launch.engine import Run

MANAGED = {"app.kubernetes.io/name": "llmtrain", "app.kubernetes.io/managed-by": "llmtrain"}
"""Labels of everything that is made here, by which it is found again."""
JOB = "batch.kubernetes.io/job-name"
"""Label that Kubernetes puts on the pods of a Job."""
RUN = "llmtrain/run"
"""Annotation: the run's directory, relative to outputs."""
NOT_AGAIN = (1, UserError.exit_code, RunFailed.exit_code, Interrupted.exit_code)
"""Exit codes that another start would only repeat; 1 is a mistake of ours."""


@dataclass(frozen=True)
class Manifest:
    """What is created for one run."""

    job: k8s.V1Job | dict[str, Any]
    """A Job; a JobSet, for which the client has no type, as the API takes it."""
    service: k8s.V1Service | None

    @property
    def name(self) -> str:
        name: str = as_data(self.job)["metadata"]["name"]
        return name

    def as_yaml(self) -> str:
        """Documents as `kubectl apply` takes them."""
        objects = [self.job] if self.service is None else [self.service, self.job]
        return "".join(f"---\n{yaml.safe_dump(as_data(item), sort_keys=False, width=120)}" for item in objects)


def as_data(item: Any) -> dict[str, Any]:
    """An object as the API takes it, typed or not."""
    data: dict[str, Any] = k8s.ApiClient(k8s.Configuration()).sanitize_for_serialization(item)
    return data


def manifest(run: Run, launch: AKSLaunch, sweep_id: str) -> Manifest:
    """A Job for `run`, submitted as part of a sweep. Raises UserError where the settings make none."""
    name, labels, several = job_name(run), labels_of(run, launch, sweep_id), launch.nodes > 1
    template = pod_template(run, launch, labels, name, first=f"{name}-0.{name}")
    template.spec.subdomain = name if several else None
    # a pod that fits none of the rules (killed for its memory, say) counts as 75 does
    rules = [evicted("Ignore"), ended("FailJob", *NOT_AGAIN), ended("Count", TryAgain.exit_code)]
    spec = job_spec(launch, template, failures=launch.restarts * launch.nodes, rules=rules)
    spec.ttl_seconds_after_finished = launch.keep_seconds
    spec.suspend = True if launch.queue else None  # Kueue starts it
    job = k8s.V1Job(api_version="batch/v1", kind="Job", metadata=metadata_of(run, launch, labels), spec=spec)
    return Manifest(job, _meeting_place(name, launch.namespace, labels) if several else None)


def job_spec(
    launch: AKSLaunch, template: k8s.V1PodTemplateSpec, failures: int, rules: list[k8s.V1PodFailurePolicyRule]
) -> k8s.V1JobSpec:
    """One pod on each machine. The Job fails after more than `failures` that count, and at once by `rules`, of which
    the first that fits a pod decides."""
    return k8s.V1JobSpec(
        backoff_limit=failures,
        completions=launch.nodes,
        parallelism=launch.nodes,
        completion_mode="Indexed" if launch.nodes > 1 else "NonIndexed",
        active_deadline_seconds=round(launch.hours * 3600),
        pod_failure_policy=k8s.V1PodFailurePolicy(rules=rules),
        pod_replacement_policy="Failed",  # never two pods on one run: the old one has ended before the new one begins
        template=template,
    )


def labels_of(run: Run, launch: AKSLaunch, sweep_id: str) -> dict[str, str]:
    """Of everything that is made for `run`."""
    return {
        **MANAGED,
        "llmtrain/experiment": _slug(run.frozen.config.name)[:63].rstrip("-"),
        "llmtrain/run-id": run.frozen.run_id,
        "llmtrain/sweep": sweep_id,
        "cost-centre": launch.cost_centre,
    }


def metadata_of(run: Run, launch: AKSLaunch, labels: dict[str, str]) -> k8s.V1ObjectMeta:
    """Of the object that is the run: its name, the queue that admits it, and which run it is."""
    queue = {"kueue.x-k8s.io/queue-name": launch.queue} if launch.queue else {}
    return k8s.V1ObjectMeta(
        name=job_name(run),
        namespace=launch.namespace,
        labels={**labels, **queue},
        annotations={RUN: relative_directory(run)},
    )


def job_name(run: Run) -> str:
    """The name of the run's Job or JobSet: one of a host and of a Service too, short enough for those of its pods."""
    return f"llmtrain-{_slug(run.frozen.config.name)[:24].rstrip('-')}-{run.frozen.run_id}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def evicted(action: str) -> k8s.V1PodFailurePolicyRule:
    """What to do with a pod that was taken away. The first rule: whatever it ended with, it did not end by itself."""
    pattern = k8s.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    return k8s.V1PodFailurePolicyRule(action=action, on_pod_conditions=[pattern])


def ended(action: str, *codes: int, operator: str = "In") -> k8s.V1PodFailurePolicyRule:
    """What to do with a pod that ended with one of `codes`; with none of them where `operator` is NotIn."""
    requirement = k8s.V1PodFailurePolicyOnExitCodesRequirement(
        container_name=CONTAINER, operator=operator, values=list(codes)
    )
    return k8s.V1PodFailurePolicyRule(action=action, on_exit_codes=requirement)


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
