"""What is counted and timed, for Prometheus."""

from collections.abc import Callable

from vitral.ship.serve.pipeline import PipelineWatch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_MOST_LABELS = 1000  # that have a series each; others are counted as one


class Metrics(PipelineWatch):
    """The metrics of one server, in a registry of their own."""

    def __init__(self, info: dict[str, str], queue_depth: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"vitral_{name}_seconds", about, buckets=_SECONDS, registry=registry)

        self._requests = Counter(
            "vitral_requests", "Requests by route and status.", ["route", "code"], registry=registry
        )
        self._request_seconds = seconds("request", "From a request's headers to its answer.")
        self._queue_seconds = seconds("queue", "A picture's wait for the model.")
        self._decode_seconds = seconds("decode", "Reading one picture.")
        self._inference_seconds = seconds("inference", "One batch in the model.")
        self._batch_size = Histogram(
            "vitral_batch_size", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        depth = Gauge("vitral_queue_depth", "Pictures that wait.", registry=registry)
        depth.set_function(queue_depth)
        self._rejected = Counter(
            "vitral_rejected", "Requests that were refused, by reason.", ["reason"], registry=registry
        )
        self._abstained = Counter("vitral_abstained", "Pictures without a sure answer.", registry=registry)
        self._predictions = Counter("vitral_predictions", "Answers by label.", ["label"], registry=registry)
        Info("vitral", "The model that is served.", registry=registry).info(info)
        self._labels: set[str] = set()

    def request(self, route: str, code: int, seconds: float) -> None:
        self._requests.labels(route, str(code)).inc()
        self._request_seconds.observe(seconds)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def predicted(self, label: str | None) -> None:
        """Counts one answer; None: the model was not sure."""
        if label is None:
            self._abstained.inc()
            return
        if len(self._labels) < _MOST_LABELS:
            self._labels.add(label)
        self._predictions.labels(label if label in self._labels else "(other)").inc()

    def batch(self, count: int, seconds: float) -> None:
        self._batch_size.observe(count)
        self._inference_seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        self._queue_seconds.observe(seconds)

    def decoded(self, seconds: float) -> None:
        self._decode_seconds.observe(seconds)

    def page(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its media type."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
