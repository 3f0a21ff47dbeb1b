"""How laws are tried with hypothesis: on the same examples on every machine and in every run, however long they take."""

from hypothesis import HealthCheck, settings

LAW = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
