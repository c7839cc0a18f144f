"""What goes wrong for a client's calls, other than its arguments."""

from __future__ import annotations

from typing import Any

from cellstack.serve.models import ServeError


class LostError(Exception):
    """The server has lost frames of a session, or the session.

    Attributes:
        token: the session.
        frame: the number of the first lost frame: the session continues with this one, if it still exists.
        open: whether it does. If not, `frame` is 1 and all frames have to be sent to a new session.
    """

    def __init__(self, message: str, token: str, frame: int, open: bool) -> None:
        super().__init__(message)
        self.token, self.frame, self.open = token, frame, open


class RefusedError(ServeError):
    """The server has refused frames: they count, but left the states of their sessions unchanged.

    Attributes:
        refused: the reasons, by position in the call.
        y: the outputs of the call, zeros where a frame was refused.
    """

    def __init__(self, refused: dict[int, str], y: Any) -> None:
        (place, why), *more = refused.items()
        text = f"frame {place}: {why}" + (f", and {len(more)} more" if more else "")
        super().__init__(400, text)
        self.refused, self.y = refused, y


class DisconnectedError(Exception):
    """The connection was lost during a request, which is sent again in the next one; callers don't see this."""
