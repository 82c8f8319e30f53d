"""What is asked of a cluster's API server, and what its answers mean in words.

Every request is repeated a few times where the server is busy or the connection breaks; that is safe, because objects
have names that say which run they are.
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client as k8s
from kubernetes import config as kubeconfig
from kubernetes.client.exceptions import ApiException
from kubernetes.utils.retry import Backoff, on_retry_after_error, retry_after_seconds

from llmtrain.config.launch import AKSLaunch
from llmtrain.errors import LLMTrainError, TryAgain, UserError
from llmtrain.launch.aks.job_sets import job_of, job_sets
from llmtrain.launch.aks.kinds import jobs
from llmtrain.launch.aks.manifests import JOB, RUN, Manifest, as_data
from llmtrain.launch.aks.states import CANCELLED, has_ended

CONNECT_S, READ_S = 10, 30
"""Longest wait for a connection, and for the next bytes of an answer."""
BACKOFF = Backoff(steps=6, duration=0.5, factor=2.0, jitter=0.2)
"""Tries of a request, and the waits between them: 16 s in all where the server names no others."""
LONGEST_WAIT_S = 60
"""A server that wants more patience (Retry-After) is not waited for."""
GONE_S, POLL_S = 60, 0.5
"""How long an old Job of the same name is waited for to go."""
UNREACHABLE = urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError


class Cluster:
    """The namespace of `launch` in the cluster that the kubeconfig names. Raises UserError where it names none."""

    def __init__(self, launch: AKSLaunch) -> None:
        self.launch, self.namespace = launch, launch.namespace
        self.client = _connection(launch.context)
        self.core, self.jobs = k8s.CoreV1Api(self.client), jobs(self.client)
        self.runs = job_sets(self.client) if launch.job_set else self.jobs
        self.has_answered = False

    def check(self) -> None:
        """Raises UserError where the namespace lacks what every pod needs."""
        claim, account = self.launch.outputs_claim, self.launch.service_account
        for kind, key, name, read in (
            ("PersistentVolumeClaim", "outputs_claim", claim, self.core.read_namespaced_persistent_volume_claim),
            ("ServiceAccount", "service_account", account, self.core.read_namespaced_service_account),
        ):
            if self.ask(read, name, self.namespace, but=(404,)) is None:
                raise UserError(
                    f"namespace {self.namespace} has no {kind} {name}: make it (`kubectl apply -k launchers/aks`), or "
                    f"set infra.launch.{key} or infra.launch.namespace"
                )

    def create(self, manifest: Manifest) -> None:
        """Have the Job or JobSet of a run, whether it is there already or not; one of the same run that has ended makes
        room.

        Raises UserError where the server refuses it, TryAgain where the server is busy or the old Job does not go.
        """
        patience = time.monotonic() + GONE_S
        while (job := self._one(self.runs.create, body=manifest.job, but=(409,))) is None:
            job = self._one(self.runs.read, name=manifest.name, but=(404,))
            if job is not None:  # else it has gone in between
                self._must_be_same_run(job, manifest)
                if "deletionTimestamp" not in job["metadata"]:
                    if not has_ended(job):
                        break
                    self.delete(job)
            if time.monotonic() > patience:
                raise TryAgain(
                    f"there is no room for the {self.runs.name} {manifest.name} after {GONE_S} s: pods of the last one "
                    f"still save. "
                    f"The same command later; `kubectl --namespace {self.namespace} get pods` shows them"
                )
            time.sleep(POLL_S)
        if manifest.service:
            uid = job["metadata"]["uid"]
            owner = k8s.V1OwnerReference(api_version="batch/v1", kind="Job", name=manifest.name, uid=uid)
            manifest.service.metadata.owner_references = [owner]  # it goes with its Job
            self.ask(self.core.create_namespaced_service, self.namespace, manifest.service, but=(409,))

    def cancel(self, name: str) -> None:
        """End a run's Job or JobSet for good, its pods with time to save; nothing happens to one that has ended or
        gone.

        A Job that has begun fails by its deadline, and its JobSet with it, and stays listed; what is still queued is
        deleted, because a queue could start it again.
        """
        found = self._one(self.runs.read, name=name, but=(404,))
        if found is None or has_ended(found):
            return
        if found["spec"].get("suspend"):
            self.delete(found)
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._one(self.runs.patch, name=name, body={"metadata": {"annotations": {CANCELLED: now}}}, but=(404,))
        job = job_of(name) if self.launch.job_set else name
        told = self._one(self.jobs.patch, name=job, body={"spec": {"activeDeadlineSeconds": 1}}, but=(404,))
        if self.launch.job_set and (told is None or has_ended(told) or "deletionTimestamp" in told["metadata"]):
            self.delete(found)  # it is between two starts, and without a Job that could fail

    def delete(self, item: dict[str, Any]) -> None:
        """Delete that very Job or JobSet and its pods; it goes when they have gone."""
        uid = k8s.V1Preconditions(uid=item["metadata"]["uid"])
        options = k8s.V1DeleteOptions(propagation_policy="Foreground", preconditions=uid)
        self._one(self.runs.delete, name=item["metadata"]["name"], body=options, but=(404, 409))

    def _one(self, request: Callable[..., Any], but: tuple[int, ...], **kwargs: Any) -> dict[str, Any] | None:
        """What the server answers about one object, as it sends it; None and raises as `ask`."""
        found = self.ask(request, namespace=self.namespace, but=but, **kwargs)
        return None if found is None else as_data(found)

    def log(self, job: str) -> str:
        """What the newest pod of a Job has printed; empty where none has begun."""
        pods = partial(self.core.list_namespaced_pod, label_selector=f"{JOB}={job}", _preload_content=False)
        answer = self.ask(pods, self.namespace)
        made = {
            pod["metadata"]["name"]: pod["metadata"]["creationTimestamp"] for pod in json.loads(answer.data)["items"]
        }
        for name in sorted(made, key=made.__getitem__, reverse=True):
            log = partial(self.core.read_namespaced_pod_log, name, _preload_content=False)
            answer = self.ask(log, self.namespace, but=(400, 404))
            if answer is not None:  # 400: it has not begun
                return str(answer.data.decode(errors="replace"))
        return ""

    def ask(self, request: Callable[..., Any], *args: Any, but: tuple[int, ...] = (), **kwargs: Any) -> Any:
        """What the server answers to `request`, repeated where that may help; None where it answers with a status
        that is in `but`. Raises UserError or TryAgain, in words."""

        def once() -> Any:
            found = request(*args, _request_timeout=(CONNECT_S, READ_S), **kwargs)
            self.has_answered = True
            return found

        try:
            return on_retry_after_error(BACKOFF, _may_pass, once)
        except ApiException as error:
            if error.status in but:
                return None
            raise self._in_words(error) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._no_answer(error) from error

    def _must_be_same_run(self, job: dict[str, Any], manifest: Manifest) -> None:
        theirs, ours = (item["metadata"].get("annotations", {}) for item in (job, as_data(manifest.job)))
        if theirs.get(RUN) != ours[RUN]:
            raise UserError(
                f"a {self.runs.name} {manifest.name} of something else is in namespace {self.namespace} "
                f"({theirs.get(RUN)}, not {ours[RUN]}): set another infra.launch.namespace, or another name="
            )

    def _in_words(self, error: ApiException) -> LLMTrainError:
        said, space = _message(error), self.namespace
        match error.status:
            case 0:
                return UserError(
                    f"{self.client.configuration.host}: no trusted connection ({said}); get the cluster's certificate "
                    f"anew: az aks get-credentials --overwrite-existing"
                )
            case 401:
                return UserError(
                    "the cluster does not accept your credentials: `az login`, then `az aks get-credentials "
                    "--resource-group GROUP --name CLUSTER` and `kubelogin convert-kubeconfig -l azurecli`"
                )
            case 403:
                return UserError(
                    f"the cluster does not allow it: {said}\nAsk for the role `Azure Kubernetes Service RBAC Writer` "
                    f"in namespace {space}, and for JobSets the Role of launchers/aks/submitters.yaml; a quota is "
                    f"raised by whoever set it"
                )
            case 404 if self.launch.job_set and not _status(error):
                return UserError(
                    "the cluster knows no JobSet: install its controller (launchers/aks/README.md, step 2), or set "
                    "infra.launch.job_set=false"
                )
            case 404:
                return UserError(
                    f"the cluster says: {said}\nIs there a namespace {space}? `kubectl apply -k launchers/aks` makes "
                    f"it, or set infra.launch.namespace"
                )
            case status if _is_busy(status):
                return TryAgain(f"the cluster is busy ({status}): {said}; the same command, later")
        return UserError(f"the cluster refuses it ({error.status}): {said}\nSet infra.launch.* to what it takes")

    def _no_answer(self, error: Exception) -> LLMTrainError:
        host = self.client.configuration.host
        if isinstance(error, UNREACHABLE) and not self.has_answered:
            return UserError(
                f"no cluster answers at {host}: is it running (`az aks show`, `az aks start`), does this machine reach "
                f"it (VPN, private cluster), and is it the right one (`kubectl config current-context`, "
                f"infra.launch.context)?"
            )
        return TryAgain(
            f"the connection to {host} broke {BACKOFF.steps} times in a row ({error}); the same command, later"
        )


def _connection(context: str | None) -> k8s.ApiClient:
    """By the kubeconfig. Raises UserError where there is none, or it lacks the context."""
    path = os.environ.get("KUBECONFIG") or "~/.kube/config"
    settings = k8s.Configuration()
    settings.retries = False  # `Cluster.ask` repeats, also what urllib3 would not
    try:
        return kubeconfig.new_client_from_config(
            config_file=path, context=context, persist_config=False, client_configuration=settings
        )
    except kubeconfig.ConfigException as error:
        if not any(Path(part).expanduser().is_file() for part in path.split(os.pathsep)):
            raise UserError(
                f"there is no kubeconfig {path}: `az aks get-credentials --resource-group GROUP --name CLUSTER` makes "
                f"one, or set KUBECONFIG"
            ) from error
        raise UserError(
            f"{path}: {str(error).removeprefix('Invalid kube-config file. ')}\n"
            f"`kubectl config get-contexts` lists what it has; set infra.launch.context to one of them"
        ) from error


def _may_pass(error: Exception) -> bool:
    """Whether the same request may be answered in a moment."""
    if isinstance(error, ApiException):
        return _is_busy(error.status) and (retry_after_seconds(error) or 0) <= LONGEST_WAIT_S
    return isinstance(error, urllib3.exceptions.HTTPError)


def _is_busy(status: int) -> bool:
    """Too many requests, something of its own, or a list that has changed too much while it was read (410)."""
    return status in (410, 429) or status >= 500


def _message(error: ApiException) -> str:
    """The server's own words."""
    return str(_status(error).get("message", error.reason))


def _status(error: ApiException) -> dict[str, Any]:
    """What the server says of it; nothing where it is asked for a kind that it does not know, or is not Kubernetes."""
    try:
        return dict(json.loads(error.body))
    except (TypeError, ValueError):
        return {}
