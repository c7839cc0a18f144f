"""What a node asks of the entry of a file that describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cellstack.bfloat16 import Halves
    from cellstack.nodes.base import Array, Types


class Entry(Protocol):
    """A node's description in a file, with its arrays; whatever doesn't fit is a `FormatError` that says where."""

    def take(self, keys: Types, optional: Types | None = None) -> dict[str, Any]:
        """Return the values of the entry, which must have these keys, and no others but the optional ones.

        Args:
            keys: with the types of their values.
            optional: those that may be left out.
        """
        ...

    def array(self, name: str, shape: tuple[int, ...], halves: bool = False) -> Array | Halves:
        """Return an array of the entry.

        Args:
            name: the array's.
            shape: that it must have.
            halves: whether it may be of bfloat16.
        """
        ...

    def inner(self, name: str, description: Any, kind: str = "") -> Entry:
        """Return an entry within this one.

        Args:
            name: its arrays' names begin with `name/`.
            description: of it.
            kind: the type that it must have; "": it has none.
        """
        ...

    def refuse(self, what: str) -> Exception:
        """Return the `FormatError` that says where in the file something is wrong."""
        ...
