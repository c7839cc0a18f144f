"""Clients of a server: many sessions over one connection, which is made again after it is lost."""

from cellstack.serve.client.asynchronous import AsyncClient, AsyncSession
from cellstack.serve.client.errors import LostError, RefusedError
from cellstack.serve.client.synchronous import Client, Session
from cellstack.serve.models import ServeError

__all__ = ["AsyncClient", "AsyncSession", "Client", "LostError", "RefusedError", "ServeError", "Session"]
