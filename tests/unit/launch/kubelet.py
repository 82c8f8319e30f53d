"""What a cluster does with Jobs and JobSets, in small: pods are processes of this machine.

The Job controller's part follows a Job's own words: parallelism, pod failure policy, backoff limit, deadline. The
kubelet's part starts a pod's command with its environment, and ends it by SIGTERM and, after the grace period, SIGKILL.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jobset_controller
from kube_api import Api

from llmtrain.launch.aks.states import has_ended

BACKOFF_S = 10
"""How long Kubernetes waits before it replaces a pod that has failed on its own."""
JOB, INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"


class Kubelet:
    """One node, with the share that holds `outputs`."""

    def __init__(self, api: Api, outputs: Path) -> None:
        self.api, self.outputs = api, outputs
        self.processes: dict[str, subprocess.Popen] = {}
        self.told: dict[str, float] = {}
        self.evicted: set[str] = set()
        self.failed: dict[str, int] = {}
        self.failing: dict[str, tuple[str, str]] = {}
        """Jobs that have failed, but for pods that still end: why."""
        self.rests: dict[str, float] = {}
        self.done: dict[str, set[str]] = {}
        self.started: dict[str, float] = {}
        self.codes: dict[str, list[int]] = {}
        """Exit codes of the pods of each Job, in order."""
        self.port = _free_port()

    def work(self) -> None:
        """One look at everything."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                del self.processes[name]
                self._ended(name, process.returncode)
            elif name in self.told and time.monotonic() > self.told[name] + self._grace(name):
                process.kill()
        jobset_controller.control(self.api)
        for job in self.api.all("jobs"):
            if not has_ended(job) or "deletionTimestamp" in job["metadata"]:
                self._control(job)

    def evict(self, pod: str) -> None:
        """Take its node away, with notice."""
        self.evicted.add(pod)
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        self.api.update("pods", pod, conditions=[condition])
        self._end(pod)

    def pods(self, job: str) -> list[str]:
        """The names of a Job's pods that live."""
        return [pod["metadata"]["name"] for pod in self.api.pods_of(job) if pod["metadata"]["name"] in self.processes]

    # ---- the Job controller

    def _control(self, job: dict) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        deleted = "deletionTimestamp" in job["metadata"]
        if time.monotonic() > self.started.get(name, time.monotonic()) + spec["activeDeadlineSeconds"]:
            late = "DeadlineExceeded", "Job was active longer than specified deadline"
            self.failing.setdefault(name, late)
        living = self.pods(name)
        if deleted or name in self.failing:
            for pod in living:
                self._end(pod)
            if not living:
                if deleted:
                    self._forget(name)
                else:
                    self._fail(name, *self.failing[name])
            return
        if spec.get("suspend"):
            return
        if len(self.done.get(name, ())) == spec["completions"]:
            condition = {"type": "Complete", "status": "True"}
            self.api.update("jobs", name, conditions=[condition], active=0)
            return
        self.started.setdefault(name, time.monotonic())
        if time.monotonic() < self.rests.get(name, 0):
            return
        taken = {self.api.get("pods", pod)["metadata"]["labels"][INDEX] for pod in living}
        for index in map(str, range(spec["completions"])):
            if index not in taken | self.done.get(name, set()):
                self._start(job, index)

    def _forget(self, job: str) -> None:
        """It has been deleted, and the next of its name begins anew."""
        for pod in self.api.pods_of(job):
            self.api.remove("pods", pod["metadata"]["name"])
        for memory in (self.failed, self.failing, self.rests, self.done, self.started):
            memory.pop(job, None)
        self.api.collect("jobs", job)

    def _fail(self, job: str, reason: str, message: str) -> None:
        condition = {"type": "Failed", "status": "True", "reason": reason, "message": message}
        self.api.update("jobs", job, conditions=[condition], active=0)

    def _start(self, job: dict, index: str) -> None:
        name, template = job["metadata"]["name"], job["spec"]["template"]
        pod = f"{name}-{index}-{len(self.codes.setdefault(name, []))}-{time.monotonic_ns() % 10**6}"
        labels = {**template["metadata"]["labels"], JOB: name, INDEX: index}
        [container] = template["spec"]["containers"]
        [mount] = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "outputs"]
        environment = {one["name"]: one["value"] for one in container["env"]}
        here = {"JOB_COMPLETION_INDEX": index, "MASTER_PORT": str(self.port), "OMP_NUM_THREADS": "1"}
        if "MASTER_ADDR" in environment:
            here["MASTER_ADDR"] = "127.0.0.1"
        command = [sys.executable if one == "python" else one for one in container["command"]]
        command = [
            str(self.outputs / one.removeprefix(f"{mount}/")) if one.startswith(mount) else one for one in command
        ]
        process = subprocess.Popen(
            command, env={**os.environ, **environment, **here, "HOME": os.environ["HOME"]}, stdin=subprocess.DEVNULL
        )
        self.processes[pod] = process
        status = {"phase": "Running"}
        spec = {**template["spec"], "nodeName": "aks-spot-0"}
        self.api.put("pods", {"metadata": {"name": pod, "labels": labels}, "spec": spec, "status": status})
        self.api.update("jobs", name, active=len(self.pods(name)))

    def _ended(self, pod: str, code: int) -> None:
        code = code if code >= 0 else 128 - code
        item = self.api.get("pods", pod)
        name, index = item["metadata"]["labels"][JOB], item["metadata"]["labels"][INDEX]
        self.codes[name].append(code)
        self.api.update("pods", pod, phase="Failed" if code else "Succeeded")
        if code == 0:
            self.done.setdefault(name, set()).add(index)
            return
        if pod in self.evicted:
            self.api.remove("pods", pod)
        job = self.api.get("jobs", name)
        action, why = self._action(job, pod, code)
        if action == "FailJob":
            self.failing.setdefault(name, ("PodFailurePolicy", why))
        elif action == "Count":
            self.failed[name] = self.failed.get(name, 0) + 1
            self.rests[name] = time.monotonic() + BACKOFF_S
            if self.failed[name] > job["spec"]["backoffLimit"]:
                self.failing.setdefault(name, ("BackoffLimitExceeded", "Job has reached the specified backoff limit"))

    def _action(self, job: dict, pod: str, code: int) -> tuple[str, str]:
        """What the pod's end means for its Job, and why, in the words of Kubernetes."""
        for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
            matching = f"matching {rule['action']} rule at index {index}"
            if "onPodConditions" in rule and pod in self.evicted:
                return rule["action"], f"Pod llmtrain/{pod} has condition DisruptionTarget {matching}"
            codes = rule.get("onExitCodes")
            if codes and (code in codes["values"]) == (codes["operator"] == "In"):
                failed = f"Container llmtrain for pod llmtrain/{pod} failed with exit code {code}"
                return rule["action"], f"{failed} {matching}"
        return "Count", ""

    # ---- the kubelet

    def _end(self, pod: str) -> None:
        if pod not in self.told:
            self.told[pod] = time.monotonic()
            self.processes[pod].send_signal(signal.SIGTERM)

    def _grace(self, pod: str) -> int:
        return self.api.get("pods", pod)["spec"]["terminationGracePeriodSeconds"]


@contextmanager
def working(api: Api, outputs: Path) -> Iterator[Kubelet]:
    """A node that works on the cluster's Jobs while the block runs."""
    kubelet, over = Kubelet(api, outputs), threading.Event()

    def loop() -> None:
        while not over.wait(0.05):
            kubelet.work()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield kubelet
    finally:
        over.set()
        thread.join()
        for process in kubelet.processes.values():
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]
