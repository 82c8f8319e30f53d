"""What JobSet's controller does with JobSets of one Job, in small: it makes the Job, and its failure policy decides."""

import re

from kube_api import Api

from llmtrain.launch.aks.states import has_ended

ACTIONS = {
    "FailJobSet": "FailJobSetFailurePolicyAction",
    "RestartJobSet": "RestartJobSetFailurePolicyAction",
    "RestartJobSetAndIgnoreMaxRestarts": "RestartJobSetAndIgnoreMaxRestartsFailurePolicyAction",
}


def control(api: Api) -> None:
    """One look at everything."""
    for job_set in api.all("jobsets"):
        if not has_ended(job_set) and "deletionTimestamp" not in job_set["metadata"]:
            _control(api, job_set)


def _control(api: Api, job_set: dict) -> None:
    name, spec, status = job_set["metadata"]["name"], job_set["spec"], job_set.get("status", {})
    [group] = spec["replicatedJobs"]
    child = f"{name}-{group['name']}-0"
    job = api.get("jobs", child)
    if job is None:
        return _make(api, job_set, child)
    if "deletionTimestamp" in job["metadata"]:
        return None
    if job["metadata"]["annotations"]["jobset.sigs.k8s.io/restart-attempt"] != str(status.get("restarts", 0)):
        return api.delete("jobs", child, {})
    if has_ended(job):
        [end] = job["status"]["conditions"]
        if end["type"] == "Complete":
            return _end(api, name, "Completed", "AllJobsCompleted")
        return _failed(api, job_set, end)
    if job["spec"]["suspend"] != spec.get("suspend", False):
        return api.merge("jobs", child, {"spec": {"suspend": spec.get("suspend", False)}})
    return None


def _failed(api: Api, job_set: dict, end: dict) -> None:
    policy, status, name = job_set["spec"]["failurePolicy"], job_set.get("status", {}), job_set["metadata"]["name"]
    action = next((rule["action"] for rule in policy["rules"] if fits(rule, end)), "RestartJobSet")
    counted = status.get("restartsCountTowardsMax", 0)
    if action == "FailJobSet":
        return _end(api, name, "Failed", ACTIONS[action])
    if action == "RestartJobSet" and counted >= policy["maxRestarts"]:
        return _end(api, name, "Failed", "ReachedMaxRestarts")
    return api.update(
        "jobsets",
        name,
        restarts=status.get("restarts", 0) + 1,
        restartsCountTowardsMax=counted + (action == "RestartJobSet"),
        conditions=[
            {"type": "RestartingJobSet", "status": "True", "reason": "FailurePolicy", "message": ACTIONS[action]}
        ],
    )


def fits(rule: dict, end: dict) -> bool:
    """Whether a rule of a JobSet's failure policy is for a Job with that condition."""
    reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
    return (not reasons or end["reason"] in reasons) and (
        not patterns or any(re.search(pattern, end["message"]) for pattern in patterns)
    )


def _make(api: Api, job_set: dict, child: str) -> None:
    name, [group] = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    ours = {"jobset.sigs.k8s.io/jobset-name": name}
    attempt = {"jobset.sigs.k8s.io/restart-attempt": str(job_set.get("status", {}).get("restarts", 0))}
    owner = {"apiVersion": job_set["apiVersion"], "kind": "JobSet", "name": name, "uid": job_set["metadata"]["uid"]}
    spec = {**group["template"]["spec"], "suspend": job_set["spec"].get("suspend", False)}
    spec["template"]["spec"]["subdomain"] = name
    labels = group["template"]["metadata"]["labels"] | ours
    api.put(
        "jobs",
        {
            "metadata": {"name": child, "labels": labels, "annotations": attempt, "ownerReferences": [owner]},
            "spec": spec,
        },
    )


def _end(api: Api, name: str, kind: str, reason: str) -> None:
    api.update("jobsets", name, conditions=[{"type": kind, "status": "True", "reason": reason, "message": ""}])
