"""The engine on Ray Serve: one replica a GPU, behind one address, routed by prefix or load. docs/ray.md says how to run it on a cluster.

pip install "mkdsl[ray]"; cd examples; serve run ray_serve:app directory=DIR replicas=2
"""

# pyright: reportMissingImports=false

import os
import pathlib

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter

from mkdsl.engine import Engine
from mkdsl.serve import Routes, assembled, create_app, merged_metrics, plain_scope, prompt_of, relayed

paths = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class Options(BaseModel):
    """As for `mkdsl serve`, of each replica. It has so many GPUs to itself, and is on the CPU with 0; an engine uses one of them as yet."""

    directory: str
    replicas: int = 1
    gpus: int = 1
    name: str | None = None
    max_batch: int = 16
    context: int | None = None
    max_queue: int = 64


class Router(RequestRouter):
    """To where a prompt's beginning has been before, unless it is much busier there."""

    def initialize_state(self, slack: int):
        self.routes = Routes(slack=slack)

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        found = {replica.replica_id: replica for replica in candidate_replicas}
        prompt = prompt_of(pending_request.args[1]) if pending_request else ""
        return [[found[replica]] for replica in self.routes.order(prompt, found)]

    def on_send_request(self, replica_id):
        super().on_send_request(replica_id)
        self.routes.begun(replica_id)

    def on_request_completed(self, replica_id, internal_request_id):
        self.routes.ended(replica_id)


class Replica:
    """An engine with the whole server in front of it, whose answers go to Front instead of to a socket."""

    def __init__(self, options: Options, api_key: str | None):
        self.tag, name = serve.get_replica_context().replica_tag, options.name or pathlib.Path(options.directory).resolve().name
        self.engine = Engine.load(options.directory, max_batch=options.max_batch, context=options.context, ahead=True)
        self.app = create_app(self.engine, model=name, api_key=api_key, max_open=options.max_batch + options.max_queue)

    async def answer(self, scope, body):
        async for messages in relayed(self.app, scope, body):
            if messages[0]["type"] == "http.response.start":
                messages[0]["headers"].append((b"x-replica", self.tag.encode()))
            yield messages

    async def page(self, scope):
        """Its name, and what it has at a path: status and text."""
        start, *rest = [message async for messages in relayed(self.app, scope, b"") for message in messages]
        return self.tag, start["status"], b"".join(message["body"] for message in rest).decode()

    def check_health(self):  # who fails this is started anew
        if self.engine.closed:
            raise RuntimeError("the engine has ended")

    def __del__(self):  # Ray calls it when the last answer is complete
        self.engine.close()


@serve.ingress(paths)
class Front:
    """Sends requests on and answers back."""

    def __init__(self, replicas):
        self.replicas = replicas

    @paths.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        pages = await self.replicas.broadcast("page", plain_scope(request)).results_async()
        refused = [Response(text, status, media_type="application/json") for _, status, text in pages if status != 200]
        return (
            refused[0]
            if refused
            else Response(merged_metrics({tag: text for tag, _, text in pages}), media_type="text/plain; version=0.0.4")
        )

    @paths.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    async def forward(self, request: Request) -> Response:
        messages = self.replicas.options(stream=True).answer.remote(plain_scope(request), await request.body())
        return await assembled(messages, lost=RayError)


def app(options: Options) -> serve.Application:
    """What `serve run` and `serve deploy` start. MKDSL_API_KEY is what clients must give as their key."""
    replica = serve.deployment(
        num_replicas=options.replicas,
        ray_actor_options={"num_gpus": options.gpus},
        max_ongoing_requests=4 * (options.max_batch + options.max_queue),  # a replica says itself when it has too many
        graceful_shutdown_timeout_s=600,
        request_router_config=RequestRouterConfig(request_router_class=Router, request_router_kwargs={"slack": options.max_batch // 2}),
    )(Replica)
    front = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1 << 16)(Front)
    return front.bind(replica.bind(options, os.environ.get("MKDSL_API_KEY")))
