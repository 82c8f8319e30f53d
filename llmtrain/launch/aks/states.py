"""How a Job stands, read from it and its pods as the API sends them."""

import re
from typing import Any

from llmtrain.launch.engine import Job, State

CANCELLED = "llmtrain/cancelled"
"""Annotation of a Job that a person has cancelled: when, in UTC."""


def state_of(job: dict[str, Any] | None, pods: list[dict[str, Any]]) -> Job:
    """How `job` stands, None being one that is not there; `pods` are its pods, oldest first."""
    if job is None:
        return Job(State.UNKNOWN, reason="no such Job")
    cancelled = CANCELLED in job["metadata"].get("annotations", {})
    running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    node = _node(running[0] if running else pods[-1]) if pods else ""
    if has_ended(job):
        return Job(State.ENDED, node, "cancelled" if cancelled else _end(job))
    if cancelled or "deletionTimestamp" in job["metadata"] or true_conditions(job) & {"FailureTarget"}:
        return Job(State.STOPPING, node, "cancelled" if cancelled else "")
    if job["spec"].get("suspend"):
        return Job(State.WAITING, reason="in the queue")
    if running and len(running) >= job["spec"].get("parallelism", 1):
        leaving = any("deletionTimestamp" in pod["metadata"] for pod in running)
        return Job(State.RUNNING, node, "its node is taken away" if leaving else "")
    return Job(State.WAITING, node, _wait(pods))


def _node(pod: dict[str, Any]) -> str:
    return str(pod["spec"].get("nodeName", ""))


def has_ended(job: dict[str, Any]) -> bool:
    """Whether a Job is over, well or not."""
    return bool(true_conditions(job) & {"Complete", "Failed"})


def true_conditions(item: dict[str, Any]) -> set[str]:
    """The conditions that hold of an object."""
    return {one["type"] for one in _conditions(item) if one["status"] == "True"}


def _conditions(item: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = item.get("status", {}).get("conditions") or []
    return found


def _end(job: dict[str, Any]) -> str:
    """Why it is over: `PodFailurePolicy, exit code 2`, `BackoffLimitExceeded`, `DeadlineExceeded`."""
    [end, *_] = [one for one in _conditions(job) if one["type"] in ("Complete", "Failed") and one["status"] == "True"]
    if end["type"] == "Complete":
        return "complete"
    code = re.search(r"exit code (\d+)", end.get("message", ""))
    return f"{end.get('reason', 'failed')}" + (f", {code[0]}" if code else "")


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
