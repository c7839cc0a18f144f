"""Sessions behind a port: models that step for many clients over WebSocket, HTTP and the Open Inference Protocol."""

from typing import TYPE_CHECKING, Any

from cellstack.serve.models import Limits, Model, Models, ServeError, Session

if TYPE_CHECKING:
    from cellstack.serve.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Limits", "Model", "Models", "ServeError", "Session"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):  # they need websockets, which models don't
        from cellstack.serve import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
