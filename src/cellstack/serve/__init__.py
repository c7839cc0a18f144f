"""Sessions behind a port: models that step for many clients over WebSocket, HTTP and the Open Inference Protocol."""

from cellstack.serve.models import Limits, Model, Models, ServeError, Session

__all__ = ["Limits", "Model", "Models", "ServeError", "Session"]
