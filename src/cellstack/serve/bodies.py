"""The bodies of requests: of limited size, within limited time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from cellstack.serve.models import ServeError

BODY_SECONDS = 60.0  # in which a request's body must arrive


async def body_of(request: Request, limit: int) -> bytes:
    """Return a request's body, of at most `limit` bytes.

    Raises:
        ServeError: a larger or compressed body, or one that takes too long.
    """
    try:
        return await asyncio.wait_for(_received(request, limit), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ServeError(408, f"the body didn't arrive within {BODY_SECONDS:.0f} seconds") from None


async def _received(request: Request, limit: int) -> bytes:
    if (encoding := request.headers.get("content-encoding", "").lower()) not in ("", "identity"):
        raise ServeError(501, f"unsupported compression type {encoding:.40}")
    too_long = ServeError(413, f"the body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_long
    return bytes(body)
