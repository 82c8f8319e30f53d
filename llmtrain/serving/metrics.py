"""Counters of an endpoint, for Prometheus and for the tracker. All are kept by the HTTP server's process."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TIMES_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
"""Bounds of vLLM's histogram of the time to first token, its longest left out."""
TOKEN_TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics",
)  # fmt: skip
OTHER = "other"
"""The endpoint of requests to paths that are not there, which anybody may invent any number of."""


class Metrics:
    """vLLM's names where the same is meant, with a prefix of our own."""

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "llmtrain_requests", "HTTP requests, by endpoint and status; 499: the client went away",
            ["endpoint", "status"], registry=registry,
        )  # fmt: skip
        self.cancelled = Counter("llmtrain_cancelled", "Requests whose client went away", registry=registry)
        self.failed = Counter("llmtrain_failed", "Requests that the engine failed", registry=registry)
        self.prompt_tokens = Counter("llmtrain_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generation_tokens = Counter("llmtrain_generation_tokens", "Tokens generated", registry=registry)
        self.queue_time = _histogram("request_queue_time_seconds", "From arrival to a place", TIMES_S, registry)
        self.first_token = _histogram("time_to_first_token_seconds", "From arrival to a token", TIMES_S, registry)
        self.token_time = _histogram(
            "inter_token_latency_seconds", "Between a sequence's tokens", TOKEN_TIMES_S, registry
        )
        self.request_time = _histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", TIMES_S, registry
        )
        Gauge("llmtrain_num_requests_running", "Requests with a place", registry=registry).set_function(running)
        Gauge("llmtrain_num_requests_waiting", "Requests that wait for one", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def figures(self) -> dict[str, float]:
        """For a tracker: totals since the start, and means of times."""
        found: dict[str, float] = {}
        for family in self.registry.collect():
            name = f"serving/{family.name.removeprefix('llmtrain_')}"
            totals = dict.fromkeys(("", "_total", "_sum", "_count"), 0.0)
            for sample in family.samples:
                kind = sample.name.removeprefix(family.name)
                if kind in totals:
                    totals[kind] += sample.value
            if family.type != "histogram":
                found[name] = totals["_total"] + totals[""]
            elif totals["_count"]:
                found[f"{name}_mean"] = totals["_sum"] / totals["_count"]
        return found


def endpoint_of(path: str) -> str:
    """The value of the label: few, whatever is asked for."""
    return next((known for known in PATHS if path == known or path.startswith(f"{known}/")), OTHER)


def _histogram(name: str, meaning: str, bounds: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"llmtrain_{name}", meaning, buckets=bounds, registry=registry)
