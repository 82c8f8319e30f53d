"""A run of several machines as a JobSet (kubernetes-sigs/jobset), for clusters that have its controller.

The JobSet makes one Indexed Job over the machines, and the Service by which they meet. When the Job fails, how it
failed decides, by the words of Kubernetes' Job controller: after an eviction all machines start again for nothing,
an end that another start would only repeat is the JobSet's, and anything else uses up one of `restarts`.
"""

from functools import partial
from typing import Any

from kubernetes import client as k8s

from llmtrain.config.launch import AKSLaunch
from llmtrain.errors import TryAgain
from llmtrain.launch.aks.kinds import Kind
from llmtrain.launch.aks.manifests import (
    NOT_AGAIN,
    Manifest,
    as_data,
    ended,
    evicted,
    job_name,
    job_spec,
    labels_of,
    metadata_of,
)
from llmtrain.launch.aks.pods import pod_template
from llmtrain.launch.engine import Run

GROUP, VERSION = "jobset.x-k8s.io", "v1alpha2"
MACHINES = "run"
"""The JobSet's name for its only group of Jobs, of which there is one."""


def job_set(run: Run, launch: AKSLaunch, sweep_id: str) -> Manifest:
    """A JobSet for `run`, submitted as part of a sweep. Raises UserError where the settings make none."""
    name, labels = job_name(run), labels_of(run, launch, sweep_id)
    template = pod_template(run, launch, labels, name, first=f"{job_of(name)}-0.{name}")  # as JobSet names its pods
    # A pod that was evicted fails the Job, whichever ends first: the others end with 75 too, and only all together are
    # more than it allows.
    again = TryAgain.exit_code
    rules = [evicted("FailJob"), ended("FailJob", again, operator="NotIn"), ended("Count", again)]
    spec = job_spec(launch, template, failures=launch.nodes - 1, rules=rules)
    job = k8s.V1JobTemplateSpec(metadata=k8s.V1ObjectMeta(labels=labels), spec=spec)
    made = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        "metadata": metadata_of(run, launch, labels),
        "spec": {
            "failurePolicy": {"maxRestarts": launch.restarts, "rules": _failure_rules()},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": MACHINES, "replicas": 1, "template": job}],
            "successPolicy": {"operator": "All"},
            "ttlSecondsAfterFinished": launch.keep_seconds,
            **({"suspend": True} if launch.queue else {}),  # Kueue starts it
        },
    }
    return Manifest(as_data(made), None)


def job_of(name: str) -> str:
    """The name of the Job that a JobSet makes, whose pods are the run's."""
    return f"{name}-{MACHINES}-0"


def job_sets(client: k8s.ApiClient) -> Kind:
    """JobSets, as the API takes them."""
    api = k8s.CustomObjectsApi(client)
    of = {"group": GROUP, "version": VERSION, "plural": "jobsets"}
    return Kind(
        name="JobSet",
        create=partial(api.create_namespaced_custom_object, **of),
        read=partial(api.get_namespaced_custom_object, **of),
        patch=partial(api.patch_namespaced_custom_object, **of),
        delete=partial(api.delete_namespaced_custom_object, **of),
        list=partial(api.list_namespaced_custom_object, **of),
    )


def _failure_rules() -> list[dict[str, Any]]:
    """The first that fits the Job's failure decides. Kubernetes gives one reason for all that pods failed by, so that
    its message has to tell them apart; one that is worded anew counts as `again`."""
    codes = "|".join(map(str, NOT_AGAIN))
    by_pods = ["PodFailurePolicy"]
    return [
        {
            "name": "evicted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": by_pods,
            "onJobFailureMessagePatterns": ["has condition DisruptionTarget "],
        },
        {
            "name": "in_vain",
            "action": "FailJobSet",
            "onJobFailureReasons": by_pods,
            "onJobFailureMessagePatterns": [f"failed with exit code ({codes}) "],
        },
        {"name": "out_of_time", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
        {"name": "again", "action": "RestartJobSet"},
    ]
