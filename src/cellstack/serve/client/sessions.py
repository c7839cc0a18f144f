"""The sessions of the clients."""

from __future__ import annotations

from typing import Any, Protocol

from cellstack.serve.client.calls import Calls, Form
from cellstack.serve.client.errors import LostError


class SessionClient(Protocol):
    """What a session uses of its client, an `AsyncClient`."""

    _calls: Calls

    async def _step_one(self, session: OpenSession, x: Any) -> Any: ...
    async def _state(self, session: OpenSession) -> bytes: ...
    async def _close(self, session: OpenSession) -> None: ...


class OpenSession:
    """What sessions of both clients have.

    Attributes:
        token: the secret with which the session is resumed, also by other clients.
        model: the model's name.
        answers: what `resume` found: outputs by the frame's number, None for a refused frame.
    """

    def __init__(self, client: SessionClient, id: int, token: str, form: Form) -> None:
        self._client, self._id, self._form = client, id, form
        self.token, self.model = token, form.model
        self.answers: dict[int, Any] = {}
        self._error: Exception | None = None  # of every further call
        self._lost: LostError | None = None  # the last one
        self._last = 0  # the last frame's number, once the session has ended

    @property
    def frame(self) -> int:
        """The number of the last frame that was sent."""
        return self._last if self._error is not None else int(self._client._calls.sent[self._id])


class AsyncSession(OpenSession):
    """A session of an `AsyncClient`, which opens it.

    Attributes:
        token: the secret with which the session is resumed, also by other clients.
        model: the model's name.
        frame: the number of the last frame that was sent.
        answers: what `AsyncClient.resume` found: outputs by the frame's number, None for a refused frame.
    """

    async def step(self, x: Any) -> Any:
        """Send the next frame, and return its answer.

        Further frames may be sent before the answer is there; frames of one turn of the event loop share a message.

        Args:
            x: `[I]`, or an id; several inputs are a dict by name, or a tuple in order.

        Returns:
            `[W]`, or a tuple if there are several outputs.

        Raises:
            RefusedError: the server has refused the frame, such as one with NaN.
            LostError: the server has lost earlier frames, or the session.
            ConnectionError: the server could not be reached again.
            ValueError, TypeError: a wrong shape, or values that aren't numbers.
        """
        return await self._client._step_one(self, x)

    async def state(self) -> bytes:
        """Return the state after all frames that were sent, for `AsyncClient.open`, also of another server."""
        return await self._client._state(self)

    async def close(self) -> None:
        """Close the session, after the answers to its frames."""
        await self._client._close(self)
