"""A stand-in for Comet's server on loopback: it answers what comet_ml asks, from what it was sent.

It knows of the protocol only what the client shows; what Comet's own server does is not proved by it.
"""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

ALREADY_EXISTS = 90999  # these numbers are comet_ml.exceptions'
KEY_NOT_REGISTERED = 90212


class CometServer(ThreadingHTTPServer):
    """What was sent, in the order of arrival."""

    daemon_threads = True

    def __init__(self, api_key: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.api_key = api_key
        self.experiments: list[str] = []
        self.metrics: list[tuple[str, int, float]] = []
        self.params: dict[str, str] = {}
        self.others: dict[str, str] = {}
        self.files: list[str] = []
        self.everything = b""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/clientlib/"

    def answer(self, path: str, query: dict[str, list[str]], body: dict) -> tuple[int, dict]:
        """HTTP status and JSON."""
        match path.removeprefix("/clientlib").removeprefix("/api/rest/v2"):
            case "/logger/add/run":
                if body["apiKey"] != self.api_key:
                    return 400, {"sdk_error_code": KEY_NOT_REGISTERED}
                if body["experimentKey"] in self.experiments and not body["getOrCreateEnabled"]:
                    return 400, {"sdk_error_code": ALREADY_EXISTS}
                if body["experimentKey"] not in self.experiments:
                    self.experiments.append(body["experimentKey"])
                return 200, {"runId": "run", "projectId": "project", "lastOffset": 0}
            case "/logger/get/run":
                return 200, {"runId": "run", "projectId": "project", "lastOffset": len(self.metrics)}
            case "/isAlive/ver":
                return 200, {"version": "4.0.0"}
            case "/status-report/update":
                return 200, {"is_alive_beat_duration_millis": 10_000, "gpu_monitor_interval_millis": 60_000}
            case "/batch/logger/experiment/metric":
                self.metrics += [(one["metricName"], one["step"], one["metricValue"]) for one in body["values"]]
            case "/batch/logger/experiment/parameter":
                self.params |= {one["parameterName"]: one["parameterValue"] for one in body["values"]}
            case "/write/experiment/log-other":
                self.others[body["key"]] = body["value"]
            case "/asset/upload":
                self.files += query["fileName"]
            case "/visualizations/upload":
                self.files += query["figName"]
            case "/experiment/metrics/summary":
                last = {name: step for name, step, _ in self.metrics}
                return 200, {"values": [{"name": name, "stepCurrent": step} for name, step in last.items()]}
            case "/experiment/parameters":
                return 200, {"values": [{"name": name, "valueCurrent": value} for name, value in self.params.items()]}
            case "/experiment/metadata":
                (key,) = query["experimentKey"]
                return 200, {"experimentKey": key, "workspaceName": "workspace", "projectName": "project"}
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    server: CometServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.everything += self.path.encode() + bytes(self.headers) + body
        parts = urlsplit(self.path)
        is_json = "json" in self.headers.get("Content-Type", "")
        status, answer = self.server.answer(parts.path, parse_qs(parts.query), json.loads(body) if is_json else {})
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing on the test's stderr."""


@contextmanager
def comet_server(api_key: str) -> Iterator[CometServer]:
    with CometServer(api_key) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
