"""What /metrics says, in Prometheus's form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
