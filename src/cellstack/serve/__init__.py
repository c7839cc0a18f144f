"""Sessions behind a port: models that step for many clients over WebSocket and HTTP."""

from typing import TYPE_CHECKING, Any

from cellstack.serve.models import Limits, Model, Models, ServeError, Session

if TYPE_CHECKING:
    from cellstack.serve.client import Client

__all__ = ["Client", "Limits", "Model", "Models", "ServeError", "Session"]


def __getattr__(name: str) -> Any:
    if name == "Client":  # it needs websockets, which models don't
        from cellstack.serve.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
