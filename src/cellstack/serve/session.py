"""One client's sequence on a server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cellstack.serve.models import Model


class Owner(Protocol):
    """A connection that sends the frames of sessions."""

    def lost(self, session: Session, why: str) -> None:
        """Stop using a session, which was closed or belongs to another connection now."""


@dataclass(eq=False)
class Session:
    """One client's sequence.

    Attributes:
        token: the secret that identifies it in requests.
        model: its model.
        number: its number in the model's pool.
        owner: the connection that currently sends its frames, None for HTTP; only this connection receives answers.
        due: `time.monotonic()` until which its frames without a connection were sent at the limit's rate.
    """

    token: str
    model: Model
    number: int
    owner: Owner | None = None
    due: float = 0.0

    @property
    def slot(self) -> int:
        """Its place in the pool."""
        return self.number % self.model.capacity

    @property
    def processed(self) -> int:
        """The number of the last frame that was processed."""
        return int(self.model.worker.count[self.slot])

    @property
    def accepted(self) -> int:
        """The number of the last frame that was queued."""
        return int(self.model.accepted[self.slot])

    @accepted.setter
    def accepted(self, number: int) -> None:
        self.model.accepted[self.slot] = number

    @property
    def used(self) -> float:
        """`time.monotonic()` of the last use."""
        return float(self.model.used[self.slot])

    def touch(self) -> None:
        """Note that it is in use now."""
        self.model.used[self.slot] = time.monotonic()

    def take(self, owner: Owner | None) -> None:
        """Give the session to a connection, or to requests over HTTP; a connection that has it loses it."""
        before, self.owner = self.owner, owner
        self.touch()
        if before is not None and before is not owner:
            before.lost(self, "another connection has resumed the session")
