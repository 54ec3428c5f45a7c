"""The server's metrics, for Prometheus."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of their own, so that a process can have several servers."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def histogram(
            name: str, what: str, labels: Sequence[str] = (), buckets: Sequence[float] = _SECONDS
        ) -> Histogram:
            return Histogram(f"elastic_gpt_{name}", what, labels, buckets=buckets, registry=registry)

        def counter(name: str, what: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"elastic_gpt_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"elastic_gpt_{name}", what, registry=registry)

        self.requests = counter("requests", "Requests answered", ["route", "status"])
        self.request_seconds = histogram("request_seconds", "From a request to the end of its answer", ["route"])
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generated_tokens = counter("generated_tokens", "Tokens drawn")
        self.running = gauge("running_generations", "Generations that have a cache slot")
        self.queue = gauge("queue_length", "Generations that wait for a cache slot")
        self.batch_size = histogram("batch_size", "Generations in one forward pass", buckets=_SIZES)
        self.first_token_seconds = histogram("first_token_seconds", "From a request to its first token")
        self.token_seconds = histogram("token_seconds", "From a token of a generation to its next")
        self.model_step = gauge("model_step", "Updates that made the model; NaN where nobody knows")

    def text(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)
