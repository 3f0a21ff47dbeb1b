"""For all tests: schedules and checkpoints are cached in a directory of the test run's own, and what tests counted is printed at the end."""

import collections

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)  # tests compile much and compute little: a third of their time
jax.config.update("jax_enable_compilation_cache", False)  # an engine has JAX keep what it compiles; tests start with nothing


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MKDSL_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def race_detector(capsys):
    """Fails a test in whose interpreted kernels Pallas saw a race. mk.jit raises; a program that a test runs by itself prints only."""
    yield
    said = capsys.readouterr().out
    print(said)
    assert "RACE DETECTED" not in said, said


def pytest_terminal_summary(terminalreporter):
    """A table of each property that tests recorded as counts {"kind": .., what: how many, ..}: a row a kind, summed over tests."""
    tables: dict[str, dict[str, collections.Counter]] = {}
    for report in (r for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", "") == "call"):
        for name, counts in report.user_properties:
            if isinstance(counts, dict) and "kind" in counts:
                row = tables.setdefault(name, {}).setdefault(counts["kind"], collections.Counter())
                row.update({what: n for what, n in counts.items() if what != "kind"})
    for name, rows in sorted(tables.items()):
        columns = list(dict.fromkeys(what for row in rows.values() for what in row))
        total = sum(rows.values(), collections.Counter())
        terminalreporter.section(name)
        terminalreporter.write_line(" " * 20 + "".join(f"{c:>18}" for c in columns))
        for kind, row in (*sorted(rows.items()), ("sum", total)):
            terminalreporter.write_line(f"{kind:<20}" + "".join(f"{row[c]:>18}" for c in columns))
