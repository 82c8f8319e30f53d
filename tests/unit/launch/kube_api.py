"""A stand-in for a cluster's API server on loopback, with the answers of the real one.

Objects have a `resourceVersion` that counts every change in the cluster; a watch tells of all changes after the one it
names, or that this is too long ago (410). Creating what is there is a 409, so is deleting with another's uid. A test
can have it be busy (429 with Retry-After), cut a watch, forget the past, or refuse somebody.
"""

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import jsonschema
import kubernetes_validate
import yaml
from crds import judged_job_set

VERSION = "1.33"
"""Of Kubernetes, whose schemas judge what is posted."""
PATH = re.compile(
    r"/(?:api/v1|apis/batch/v1|apis/jobset\.x-k8s\.io/v1alpha2)"
    r"/namespaces/(?P<space>[^/]+)/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?P<log>/log)?$"
)
KINDS = {
    "jobs": ("batch/v1", "Job"),
    "jobsets": ("jobset.x-k8s.io/v1alpha2", "JobSet"),
    "pods": ("v1", "Pod"),
    "services": ("v1", "Service"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "serviceaccounts": ("v1", "ServiceAccount"),
}
MERGES = ("application/strategic-merge-patch+json", "application/merge-patch+json")
REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "AlreadyExists", 410: "Expired"}
REASONS |= {422: "Invalid", 429: "TooManyRequests"}


class Refused(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Api:
    """What the cluster holds, and how it misbehaves."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[tuple[str, str], dict] = {}
        self.history: list[tuple[int, str, str, dict]] = []
        self.version = 100
        self.forgotten = 0
        self.namespace, self.token = "llmtrain", "a-token"
        self.asked: list[str] = []
        self.has_gone = False
        self.knows_job_sets = True
        self.logs: dict[str, str] = {}
        """What pods have printed, by their names; those that are not here have not begun."""
        self.answers: list[Refused] = []
        """Given to the next requests, instead of answering them."""
        self.cut_watches = 0
        """Of the next watches, so many are cut in the middle of an event."""
        self.lost_answers: list[str] = []
        """Requests that are carried out, once each, but the connection is cut before the answer: `POST jobs`."""
        for plural, name in (("persistentvolumeclaims", "llmtrain-outputs"), ("serviceaccounts", "llmtrain")):
            self.put(plural, {"metadata": {"name": name}})

    def put(self, plural: str, item: dict, kind: str = "ADDED") -> dict:
        """Keep `item` as it is now, and tell the watches."""
        with self.changed:
            self.version += 1
            version, kind_of = KINDS[plural]
            item = {"apiVersion": version, "kind": kind_of, **copy.deepcopy(item)}
            item["metadata"]["resourceVersion"] = str(self.version)
            item["metadata"].setdefault("uid", str(uuid.uuid4()))
            item["metadata"].setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            key = plural, item["metadata"]["name"]
            if kind == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = item
            self.history.append((self.version, plural, kind, item))
            self.changed.notify_all()
            return item

    def get(self, plural: str, name: str) -> dict | None:
        with self.changed:
            return copy.deepcopy(self.objects.get((plural, name)))

    def all(self, plural: str) -> list[dict]:
        with self.changed:
            return [copy.deepcopy(item) for (kind, _), item in sorted(self.objects.items()) if kind == plural]

    def update(self, plural: str, name: str, **status: object) -> None:
        """Merge into an object's status."""
        with self.changed:
            item = self.get(plural, name)
            item["status"] = item.get("status", {}) | status
            self.put(plural, item, "MODIFIED")

    def remove(self, plural: str, name: str) -> None:
        with self.changed:
            if item := self.get(plural, name):
                self.put(plural, item, "DELETED")

    def forget(self) -> None:
        """As etcd's compaction does: changes until now cannot be told of again."""
        with self.changed:
            self.forgotten = self.version

    # ---- verbs

    def create(self, plural: str, item: dict) -> dict:
        try:
            if plural == "jobsets":
                judged_job_set(item, VERSION)
            else:
                kubernetes_validate.validate(item, VERSION, strict=True)
        except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
            raise Refused(422, f"{item['kind']} is invalid: {error.message}") from error
        name = item["metadata"]["name"]
        with self.changed:
            if (plural, name) in self.objects:
                raise Refused(409, f'{plural}.batch "{name}" already exists')
            return self.put(plural, item)

    def read(self, plural: str, name: str) -> dict:
        if item := self.get(plural, name):
            return item
        raise Refused(404, f'{plural} "{name}" not found')

    def merge(self, plural: str, name: str, change: dict) -> dict:
        def merged(old: dict, new: dict) -> dict:
            return old | {
                key: merged(old.get(key, {}), value) if isinstance(value, dict) else value for key, value in new.items()
            }

        with self.changed:
            if plural == "jobsets" and change.get("spec", {}).keys() - {"suspend"}:
                raise Refused(422, "spec: field is immutable")
            return self.put(plural, merged(self.read(plural, name), change), "MODIFIED")

    def delete(self, plural: str, name: str, options: dict) -> dict:
        with self.changed:
            item = self.read(plural, name)
            if options.get("preconditions", {}).get("uid", item["metadata"]["uid"]) != item["metadata"]["uid"]:
                raise Refused(409, "the UID in the precondition does not match the UID in record")
            item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            item["metadata"]["finalizers"] = ["foregroundDeletion"]
            self.put(plural, item, "MODIFIED")
            for job in self.jobs_of(name) if plural == "jobsets" else []:
                self.delete("jobs", job["metadata"]["name"], {})
            self.collect(plural, name)
            return item

    def collect(self, plural: str, name: str) -> None:
        """Remove what was deleted once nothing is left of what it owns, and so its owner."""
        item = self.get(plural, name)
        if item and "deletionTimestamp" in item["metadata"] and not self.jobs_of(name) + self.pods_of(name):
            self.remove(plural, name)
            for owner in item["metadata"].get("ownerReferences", []):
                self.collect("jobsets", owner["name"])

    def jobs_of(self, job_set: str) -> list[dict]:
        label = "jobset.sigs.k8s.io/jobset-name"
        return [job for job in self.all("jobs") if job["metadata"].get("labels", {}).get(label) == job_set]

    def pods_of(self, job: str) -> list[dict]:
        label = "batch.kubernetes.io/job-name"
        return [pod for pod in self.all("pods") if pod["metadata"]["labels"].get(label) == job]

    def list(self, plural: str, query: dict[str, str]) -> dict:
        with self.changed:
            found = [item for item in self.all(plural) if _matches(item, query.get("labelSelector", ""))]
            start, version = 0, self.version
            if token := query.get("continue"):
                version, start = map(int, token.split("-"))
                if version < self.forgotten:
                    raise Refused(410, "The provided continue parameter is too old")
            end = start + int(query.get("limit", len(found) or 1))
            meta = {"resourceVersion": str(version)}
            if end < len(found):
                meta["continue"] = f"{version}-{end}"
            return {"kind": "List", "metadata": meta, "items": found[start:end]}

    def watch(self, plural: str, query: dict[str, str]) -> Iterator[dict]:
        seen, until = int(query["resourceVersion"]), time.monotonic() + int(query["timeoutSeconds"])
        while (left := until - time.monotonic()) > 0:
            with self.changed:
                if seen < self.forgotten:
                    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                    yield {"type": "ERROR", "object": status}
                    return
                new = [change for change in self.history if change[0] > seen]
                if not new:
                    self.changed.wait(left)
            for version, kind, event, item in new:
                seen = version
                if kind == plural and _matches(item, query.get("labelSelector", "")):
                    yield {"type": event, "object": item}
        bookmark = {"kind": KINDS[plural][1], "metadata": {"resourceVersion": str(seen)}}
        yield {"type": "BOOKMARK", "object": bookmark}


def _matches(item: dict, selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    return all(
        labels.get(key) == value for key, _, value in (part.partition("=") for part in selector.split(",") if part)
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> object:
        api: Api = self.server.api
        if api.has_gone:
            return self.cut()
        address = urlparse(self.path)
        query = {key: value[0] for key, value in parse_qs(address.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        verb = "WATCH" if query.get("watch") == "true" else self.command
        place = PATH.match(address.path)
        api.asked.append(f"{verb} {place['plural']}")
        if place["plural"] == "jobsets" and not api.knows_job_sets:
            return self.send(404, b"404 page not found\n", {"Content-Type": "text/plain; charset=utf-8"})
        try:
            if api.answers:
                raise api.answers.pop(0)
            if self.headers.get("Authorization") != f"Bearer {api.token}":
                raise Refused(401, "Unauthorized")
            if verb == "WATCH":
                return self.stream(api, place["plural"], query)
            if place["log"]:
                api.read("pods", place["name"])
                if place["name"] not in api.logs:
                    raise Refused(400, f'container "llmtrain" in pod "{place["name"]}" is waiting to start')
                return self.send(200, api.logs[place["name"]].encode(), {"Content-Type": "text/plain"})
            found = self.carried_out(api, verb, place, query, body)
        except Refused as refused:
            status = {"kind": "Status", "status": "Failure", "message": str(refused), "code": refused.status}
            status["reason"] = REASONS.get(refused.status, "InternalError")
            return self.say(refused.status, status, refused.headers)
        if api.asked[-1] in api.lost_answers:
            api.lost_answers.remove(api.asked[-1])
            return self.cut()
        return self.say(201 if verb == "POST" else 200, found)

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

    def carried_out(self, api: Api, verb: str, place: re.Match, query: dict[str, str], body: dict) -> dict:
        plural, name = place["plural"], place["name"]
        if place["space"] != api.namespace:
            if verb == "POST" or name:
                raise Refused(404, f'namespaces "{place["space"]}" not found')
            return {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": []}
        match verb, name:
            case "POST", None:
                return api.create(plural, body)
            case "GET", None:
                return api.list(plural, query)
            case "GET", _:
                return api.read(plural, name)
            case "PATCH", _ if self.headers["Content-Type"] not in MERGES:
                raise Refused(415, f"{self.headers['Content-Type']} is no merge")
            case "PATCH", _:
                return api.merge(plural, name, body)
            case "DELETE", _:
                return api.delete(plural, name, body)
        raise Refused(405, "no such verb")

    def say(self, status: int, item: dict, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(item).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, api: Api, plural: str, query: dict[str, str]) -> object:
        cut = api.cut_watches > 0
        api.cut_watches -= cut
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in api.watch(plural, query):
            data = json.dumps(event).encode() + b"\n"
            if cut and event["type"] != "BOOKMARK":
                self.wfile.write(b"%x\r\n" % len(data) + data[: len(data) // 2])
                return self.cut()
            self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
        return self.wfile.write(b"0\r\n\r\n")

    def cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


@contextmanager
def serving(directory: Path) -> Iterator[tuple[Api, Path]]:
    """An API on loopback, and the kubeconfig that leads to it."""
    api = Api()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.api = api
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    context = {"cluster": "stand-in", "user": "someone"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "stand-in",
        "clusters": [{"name": "stand-in", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "someone", "user": {"token": api.token}}],
        "contexts": [{"name": "stand-in", "context": context}],
    }
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield api, path
    finally:
        api.has_gone = True  # for connections that are kept
        server.shutdown()
        server.server_close()
