"""What /metrics says, in Prometheus's form."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from mkdsl.engine import Engine

TIMES = tuple(base * 10.0**power for power in range(-4, 2) for base in (1, 2, 5))  # seconds, 100 us to 50 s


class Metrics:
    """Counters of one server; gauges are read from its engine when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("mkdsl_requests", "Requests by path and status.", ["path", "status"], registry=self._registry)
        self.prompt_tokens = Counter("mkdsl_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.answer_tokens = Counter("mkdsl_answer_tokens", "Tokens of answers.", registry=self._registry)
        self.first_token = self._times("mkdsl_time_to_first_token_seconds", "From a request to its first token.")
        self.per_token = self._times("mkdsl_time_per_token_seconds", "Of an answer's tokens after the first ones, their mean.")
        for name, what in {
            "waiting": "Answers that have not begun.",
            "running": "Answers that prefill or decode.",
            "pages": "Pages of the cache.",
            "free": "Pages that nobody holds.",
            "published": "Pages whose content is found by its prefix.",
        }.items():
            gauge = Gauge(f"mkdsl_{name}", what, registry=self._registry)
            gauge.set_function(lambda name=name: getattr(engine.stats(), name))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)

    def _times(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=TIMES, registry=self._registry)


def merged_metrics(pages: Mapping[str, str]) -> bytes:
    """One page of several servers' /metrics.

    Args:
      pages: of each server, by its name.

    Returns:
      All samples, each with the label `replica`.
    """
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected:
    """Metrics that are known already, as a registry wants them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
