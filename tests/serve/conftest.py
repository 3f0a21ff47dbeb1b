"""A real server, in a thread, in front of a real engine of a tiny checkpoint."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import openai
import pytest
import uvicorn
from engine.conftest import byte_tokenizer, checkpoint, shape  # noqa: F401 (fixtures)

from mkdsl import models
from mkdsl.engine import Engine, load_tokenizer
from mkdsl.engine._backend import Backend
from mkdsl.engine._decoder import Pool, decode_steps
from mkdsl.engine._pages import PagePool
from mkdsl.engine._scheduler import Scheduler
from mkdsl.serve import create_app

KEY = "a key"
MAX_OPEN = 6


@contextlib.contextmanager
def served(app):
    """Serves an application at some port of this machine, and gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def session_checkpoint(request, tmp_path_factory, byte_tokenizer):  # noqa: F811
    return checkpoint.__wrapped__(tmp_path_factory.mktemp("serve"), byte_tokenizer)


@pytest.fixture(scope="session")
def engine(session_checkpoint):
    """In float32: what an answer is must not depend on how sums are rounded in batches of different sizes."""
    config, params = models.load(session_checkpoint)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    scheduler = Scheduler(PagePool(count=16, size=64), max_batch=4, piece=64, steps=4)
    backend = Backend(
        config,
        params,
        pages=16,
        page_size=64,
        context=256,
        max_batch=4,
        steps=4,
        cache_dtype=jnp.float32,
        step_of=decode_steps(config, Pool(count=16, size=64, width=4)),
    )
    tokenizer = load_tokenizer(session_checkpoint)
    with Engine(config=config, tokenizer=tokenizer, context=256, scheduler=scheduler, backend=backend) as engine:
        yield engine


@pytest.fixture(scope="session")
def address(engine):
    with served(create_app(engine, model="tiny", api_key=KEY, max_open=MAX_OPEN)) as address:
        yield address


@pytest.fixture(scope="session")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client
