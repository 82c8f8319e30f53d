"""The JobSets, Jobs and pods of a namespace, listed once and from then on kept up to date by what has changed.

A watch begins where the last one ended (`resourceVersion`), so that a connection that breaks loses nothing; where the
server has forgotten that far back (410), everything is listed anew.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.watch import Watch

from llmtrain.launch.aks.cluster import Cluster
from llmtrain.launch.aks.manifests import JOB, MANAGED

PAGE = 500
"""Objects in one answer."""
SELECTOR = ",".join(f"{key}={value}" for key, value in MANAGED.items())


class Watched:
    """The objects of one kind that llmtrain has made, by name, as the API sends them."""

    def __init__(self, cluster: Cluster, request: Callable[..., Any]) -> None:
        self.cluster, self.request = cluster, request
        self.objects: dict[str, dict[str, Any]] = {}
        self.version: str | None = None

    def refresh(self) -> None:
        """Bring `objects` up to date; takes a second where they were listed before. Raises as `Cluster.ask` does."""
        if self.version is not None:
            self.cluster.ask(self._changes)
        if self.version is None:
            self.cluster.ask(self._list)

    def _list(self, **options: Any) -> None:
        """All pages; a server that has forgotten what comes next answers with 410, and is asked from the start."""
        found: dict[str, dict[str, Any]] = {}
        following: dict[str, str] = {}
        while True:
            answer = self.request(
                namespace=self.cluster.namespace,
                label_selector=SELECTOR,
                limit=PAGE,
                _preload_content=False,  # typed objects take a millisecond each
                **following,
                **options,
            )
            page = json.loads(answer.data)
            found |= {item["metadata"]["name"]: item for item in page["items"]}
            if not (token := page["metadata"].get("continue")):
                break
            following = {"_continue": token}
        self.objects, self.version = found, page["metadata"]["resourceVersion"]

    def _changes(self, **options: Any) -> None:
        """What has changed since the last look."""
        stream = Watch(return_type="object").stream(
            self.request,
            namespace=self.cluster.namespace,
            label_selector=SELECTOR,
            resource_version=self.version,
            allow_watch_bookmarks=True,
            timeout_seconds=1,
            **options,
        )
        try:
            for event in stream:
                item = event["raw_object"]
                name = item["metadata"].get("name")
                if event["type"] in ("ADDED", "MODIFIED"):
                    self.objects[name] = item
                elif event["type"] == "DELETED":
                    self.objects.pop(name, None)
                self.version = item["metadata"]["resourceVersion"]
        except ApiException as error:
            if error.status != HTTPStatus.GONE:
                raise
            self.version = None


class Namespace:
    """What `llmtrain` has in a cluster's namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.jobs = Watched(cluster, cluster.jobs.list)
        self.pods = Watched(cluster, cluster.core.list_namespaced_pod)
        self.runs = Watched(cluster, cluster.runs.list) if cluster.launch.job_set else self.jobs
        """What runs are: Jobs, or JobSets."""

    def refresh(self) -> None:
        """All at once."""
        each = {self.jobs, self.pods, self.runs}
        with ThreadPoolExecutor(len(each)) as pool:
            list(pool.map(Watched.refresh, each))

    def pods_by_job(self) -> dict[str, list[dict[str, Any]]]:
        """The pods of each Job, oldest first."""
        found: dict[str, list[dict[str, Any]]] = {}
        for pod in sorted(self.pods.objects.values(), key=lambda pod: pod["metadata"].get("creationTimestamp", "")):
            found.setdefault(pod["metadata"]["labels"].get(JOB, ""), []).append(pod)
        return found
