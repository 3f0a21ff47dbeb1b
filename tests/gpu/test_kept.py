"""What is traced and lowered once and kept: found by its content alone, never instead of something else, and the same to the bit."""

import dataclasses
import logging
import pathlib
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.custom_partitioning import custom_partitioning

import mkdsl
from mkdsl.gpu import NoContentError, _kept, committed, content, kept, record
from mkdsl.models import SHAPES
from mkdsl.schedule import Handoff, profile
from mkdsl.search import directory, read, write

PACKAGE = pathlib.Path(mkdsl.__file__).parent
SMOLLM2 = SHAPES["smollm2-135m"]


@pytest.fixture
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MKDSL_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, "mkdsl")
    return tmp_path


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    left: jax.Array
    right: jax.Array


class Counted:
    """A function that knows how often it is traced; `kept()` is what each process makes of it."""

    def __init__(self):
        self.traced = 0

    def __call__(self, x, pair, *, scale=1.0, **_):
        self.traced += 1
        return x + 1, Pair(left=pair.left * scale, right=jnp.sin(pair.right).sum())

    def kept(self):
        def counted(*args, **static):  # another function, of which JAX knows nothing
            return self(*args, **static)

        return kept(counted, of="counted, the first")


ARGS = np.float32([1, 2, 3]), Pair(left=np.int32([[1, 2]]), right=np.float32([0.1, 0.7]))


# It is found again.


def test_it_is_traced_once_and_is_the_same_to_the_bit(cache):
    f = Counted()
    fresh = jax.jit(f.kept(), static_argnames="scale")(*ARGS, scale=2.5)
    again = jax.jit(f.kept(), static_argnames="scale")(*ARGS, scale=2.5)
    assert f.traced == 1
    assert jax.tree.structure(fresh) == jax.tree.structure(again)
    for ours, theirs, plain in zip(*map(jax.tree.leaves, (fresh, again, jax.jit(f)(*ARGS, scale=2.5))), strict=True):
        assert np.array_equal(ours, theirs)
        np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_what_is_donated_is_donated(cache):
    for _ in "fresh", "found":
        jitted = jax.jit(Counted().kept(), donate_argnums=0)
        x = committed(jnp.arange(1000.0))
        assert jitted.lower(x, ARGS[1]).compile().memory_analysis().alias_size_in_bytes >= x.nbytes
        jitted(x, ARGS[1])
        assert x.is_deleted()


def test_committed_arrays_are_compiled_for_once(cache):
    jitted = jax.jit(Counted().kept())
    x, pair = committed(ARGS)
    for _ in range(3):
        x, _ = jitted(x, pair)
    assert jitted._cache_size() == 1


def test_what_may_be_partitioned_is_whole(cache):
    """As cuDNN's attention is; JAX's export alone cannot lower it for one device."""

    @custom_partitioning
    def double(x):
        return 2 * x

    double.def_partition(partition=None, sharding_rule="i -> i")
    for _ in "fresh", "found":
        assert list(jax.jit(kept(lambda x: double(x) + 1, of="doubled"))(np.float32([3, 4]))) == [7, 9]


def test_within_another(cache):
    inner, outer = Counted(), Counted()
    for _ in "fresh", "found":
        step = inner.kept()

        def twice(x, pair, step=step):
            outer.traced += 1
            return step(step(x, pair)[0], pair)

        jax.jit(kept(twice, of=("twice", step.content)))(*ARGS)
    assert (inner.traced, outer.traced) == (1, 1)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"another\n" + b], ids=["cut", "empty", "other"])
def test_what_is_damaged_is_made_again(cache, caplog, damage):
    Counted().kept().exported(*ARGS)
    (path,) = (cache / "exported").iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert not Counted().kept().exported(*ARGS)[1]
    assert f"{path} is removed and made again" in caplog.text
    assert Counted().kept().exported(*ARGS)[1]


def test_what_jax_does_not_understand_is_made_again(cache, caplog):
    Counted().kept().exported(*ARGS)
    (path,) = (cache / "exported").iterdir()
    write(path, b"something else")
    assert not Counted().kept().exported(*ARGS)[1]
    assert "is removed and made again" in caplog.text
    assert Counted().kept().exported(*ARGS)[1]


def test_where_others_may_write_nothing_is_read_or_kept(cache, caplog):
    f = Counted()
    f.kept().exported(*ARGS)
    (cache / "exported").chmod(0o777)
    jax.jit(f.kept())(*ARGS)
    assert f.traced == 2
    assert "others may write to it" in caplog.text
    assert (directory("exported").stat().st_mode & 0o777) == 0o777
    assert len(list((cache / "exported").iterdir())) == 1


def test_a_directory_of_its_own(cache):
    Counted().kept().exported(*ARGS)
    assert directory("exported").stat().st_mode & 0o777 == 0o700


def test_without_a_place_to_keep_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MKDSL_CACHE", str(tmp_path / "file"))
    assert float(jax.jit(Counted().kept())(*ARGS)[0][0]) == 2


def test_a_reader_never_sees_half_of_what_two_write(tmp_path):
    path, texts, seen = tmp_path / "a", [bytes([i]) * 300_000 for i in range(2)], []
    writers = [threading.Thread(target=lambda text=text: [write(path, text) for _ in range(20)]) for text in texts]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        seen.append(read(path))
    assert set(seen) <= {None, *texts}
    assert read(path) in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_two_threads_that_want_the_same(cache):
    f = Counted()
    k, seen = f.kept(), []
    threads = [threading.Thread(target=lambda: seen.append(k.exported(*ARGS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert f.traced == 1
    assert sorted(there for _, there in seen) == [False, True, True, True]


# Nothing else is found.

PLAIN = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("a,'()=", max_size=4) | st.binary(max_size=2)
OURS = st.sampled_from([SMOLLM2, dataclasses.replace(SMOLLM2, eps=2e-5), profile("h200"), profile("h100"), *Handoff])
VALUES = st.recursive(PLAIN | OURS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def typed(value):
    """What tells a value from all others: 1, 1.0 and True are equal in Python, and 0.0 and -0.0."""
    if type(value) is tuple:
        return tuple(map(typed, value))
    return type(value), str(value) if isinstance(value, float) else value


@given(VALUES, VALUES)
def test_different_values_have_different_content(a, b):
    assert (content(a) == content(b)) == (typed(a) == typed(b))


LEAVES = st.tuples(st.lists(st.integers(1, 3), max_size=2).map(tuple), st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32]))
CALLS = st.tuples(
    st.lists(LEAVES, min_size=1, max_size=3), st.booleans(), st.sampled_from(["cpu", "cuda"]), st.dictionaries(st.sampled_from("abc"), VALUES), st.text(max_size=2)
)  # fmt: skip


def key_of(call):
    leaves, nested, platform, static, of = call
    avals = tuple(jax.ShapeDtypeStruct(*leaf) for leaf in leaves)
    return kept(Counted().__call__, of=of)._key((avals, {}) if nested else avals, static, platform)


@given(CALLS, CALLS)
def test_the_key_covers_every_argument(a, b):
    same = a[:3] == b[:3] and a[4] == b[4] and {k: typed(v) for k, v in a[3].items()} == {k: typed(v) for k, v in b[3].items()}
    assert (key_of(a) == key_of(b)) == same


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SMOLLM2)])
def test_every_field_of_a_model_counts(field):
    assert content(dataclasses.replace(SMOLLM2, **{field: 0.25})) != content(SMOLLM2)


CALL = ([((2,), jnp.float32)], False, "cpu", {}, "a function")


def test_what_depends_on_the_device(monkeypatch):
    def key(local):
        return kept(Counted().__call__, of="f", local=local)._key((jax.ShapeDtypeStruct((2,), jnp.float32),), {}, "cpu")

    before = key(True), key(False)
    monkeypatch.setattr(_kept, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91900))
    assert key(True) != before[0] and key(False) == before[1]


def test_another_version_of_jax(monkeypatch):
    before = key_of(CALL)
    monkeypatch.setattr(_kept, "VERSIONS", ["0.11.2", "0.11.3"])
    assert key_of(CALL) != before


@pytest.mark.parametrize(("flag", "value"), [("jax_default_matmul_precision", "highest"), ("jax_threefry_partitionable", False)])
def test_flags_of_jax_that_change_what_is_traced(flag, value):
    before, was = key_of(CALL), getattr(jax.config, flag)
    jax.config.update(flag, value)
    try:
        assert key_of(CALL) != before
    finally:
        jax.config.update(flag, was)
    assert key_of(CALL) == before


@pytest.mark.parametrize("file", ["engine/_sampler.py", "lower/_kernel.py", "ops/_fold.py", "models/_decoder.py"])
def test_the_key_follows_the_source(file, tmp_path, monkeypatch):
    before = key_of(CALL)
    shutil.copytree(PACKAGE, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(_kept, "ROOT", tmp_path / "copy")
    assert key_of(CALL) == before
    shutil.copytree(PACKAGE, tmp_path / "changed", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "changed" / file).open("a") as source:
        source.write("\n# another line\n")
    monkeypatch.setattr(_kept, "ROOT", tmp_path / "changed")
    assert key_of(CALL) != before


# What has no content is not kept.


class Word(str):
    pass


@dataclasses.dataclass(frozen=True)
class Theirs:
    x: int = 1


@pytest.mark.parametrize("value", [lambda x: x, Theirs(), SMOLLM2.__class__, [1], {"a": 1}, Word("a"), np.float32(1), (1, (object(),))])
def test_what_has_no_content(value, cache):
    with pytest.raises(NoContentError, match="no content"):
        content(value)


def test_a_function_that_is_not_ours_says_what_it_is():
    with pytest.raises(NoContentError, match="is not mkdsl"):
        kept(typed)


def test_a_function_of_a_function_is_called_and_not_kept(cache):
    f = Counted()
    jax.jit(f.kept(), static_argnames="other")(*ARGS, other=Theirs())
    assert f.traced == 1
    assert not (cache / "exported").exists()
