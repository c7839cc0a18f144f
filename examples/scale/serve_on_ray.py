"""Serve sessions from several replicas on Ray Serve: each session stays with its replica.

Needs `pip install 'cellstack[serve]' 'ray[serve]'`. The client chooses the session's token, and sends it as the header
`x-session-id` of every request, from which Ray's router finds the replica:

    POST /models/NAME/sessions?token=TOKEN    POST /sessions/TOKEN/step {"x": [...]}    GET /sessions/TOKEN/state

A replica keeps its sessions in memory. Where replicas come and go, ask for the state now and then: after an answer of
404, open the session again with it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from cellstack.serve import Limits, Models
from cellstack.serve.app import application

ROUTER = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 0},  # another replica doesn't have the session
)


async def close_idle(models: Models) -> None:
    """Close sessions that weren't used for as long as the limits say, again and again."""
    while True:
        await asyncio.sleep(min(5.0, models.limits.idle / 4))
        await models.drop_unused()


def sessions(model: str, replicas: int, limits: Limits | None = None) -> Any:
    """Return an application for `serve.run`.

    Args:
        model: the file of a network, with the same path on all machines.
        replicas: the number of replicas.
        limits: of each replica.
    """

    def build() -> Any:
        models = Models(limits or Limits())
        models.add(Path(model))
        app = application(models)

        @asynccontextmanager
        async def running(_: Any) -> AsyncIterator[None]:
            for served in models.all():
                served.start(asyncio.get_running_loop())
            task = asyncio.create_task(close_idle(models))
            yield
            task.cancel()

        app.router.lifespan_context = running
        return app

    @serve.deployment(num_replicas=replicas, request_router_config=ROUTER)
    @serve.ingress(build)
    class Sessions:
        """A replica: the HTTP API of `cellstack serve`."""

    return Sessions.bind()
