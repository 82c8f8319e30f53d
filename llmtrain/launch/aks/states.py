"""How a Job or a JobSet stands, read from it and its pods as the API sends them."""

import re
from typing import Any

from llmtrain.launch.engine import Job, State

CANCELLED = "llmtrain/cancelled"
"""Annotation of a Job or JobSet that a person has cancelled: when, in UTC."""

END = {"Complete", "Completed", "Failed"}
"""Conditions of a Job, or a JobSet, that is over."""


def state_of(run: dict[str, Any] | None, pods: list[dict[str, Any]], job: dict[str, Any] | None) -> Job:
    """How `run` stands, a Job or a JobSet, None being one that is not there. `job` is the Job itself, or the one that
    the JobSet has made; `pods` are its pods, oldest first."""
    if run is None:
        return Job(State.UNKNOWN, reason="it is not in the cluster")
    cancelled = CANCELLED in run["metadata"].get("annotations", {})
    running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    node = _node(running[0] if running else pods[-1]) if pods else ""
    if has_ended(run):
        return Job(State.ENDED, node, "cancelled" if cancelled else _end(run, job))
    if cancelled or "deletionTimestamp" in run["metadata"] or true_conditions(run) & {"FailureTarget"}:
        return Job(State.STOPPING, node, "cancelled" if cancelled else "")
    if run["spec"].get("suspend"):
        return Job(State.WAITING, reason="in the queue")
    if job is not None and running and len(running) >= job["spec"].get("parallelism", 1):
        leaving = any("deletionTimestamp" in pod["metadata"] for pod in running)
        return Job(State.RUNNING, node, "its node is taken away" if leaving else "")
    restarting = "all its machines start again" if "RestartingJobSet" in true_conditions(run) else ""
    return Job(State.WAITING, node, _wait(pods) or restarting)


def _node(pod: dict[str, Any]) -> str:
    return str(pod["spec"].get("nodeName", ""))


def has_ended(run: dict[str, Any]) -> bool:
    """Whether a Job or a JobSet is over, well or not."""
    return bool(true_conditions(run) & END)


def true_conditions(item: dict[str, Any]) -> set[str]:
    """The conditions that hold of an object."""
    return {one["type"] for one in _conditions(item) if one["status"] == "True"}


def _conditions(item: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = item.get("status", {}).get("conditions") or []
    return found


def _end(run: dict[str, Any], job: dict[str, Any] | None) -> str:
    """Why it is over: `PodFailurePolicy, exit code 2`, `BackoffLimitExceeded`, `DeadlineExceeded`; of a JobSet, what
    its Job failed by, and `ReachedMaxRestarts` where that was once too often."""
    [end, *_] = [one for one in _conditions(run) if one["type"] in END and one["status"] == "True"]
    if end["type"] != "Failed":
        return "complete"
    reason = str(end.get("reason", "failed"))
    if job is not None and job is not run and has_ended(job):
        cause = _end(job, job)
        return f"{reason}: {cause}" if reason == "ReachedMaxRestarts" else cause
    code = re.search(r"exit code (\d+)", end.get("message", ""))
    return reason + (f", {code[0]}" if code else "")


def _wait(pods: list[dict[str, Any]]) -> str:
    """What the newest pod that has not ended waits for."""
    for pod in reversed(pods):
        status = pod.get("status", {})
        if status.get("phase") not in (None, "Pending"):
            continue
        for container in status.get("containerStatuses") or []:
            if waiting := container.get("state", {}).get("waiting"):
                return str(waiting.get("reason", ""))
        for condition in _conditions(pod):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    if any("DisruptionTarget" in true_conditions(pod) for pod in pods[-1:]):
        return "its node was taken away"
    return ""
