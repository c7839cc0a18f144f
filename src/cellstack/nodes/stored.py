"""The interface through which a node reads its entry in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cellstack.cells.bfloat16 import BFloat16Array
    from cellstack.nodes.values import Array, Types


class Entry(Protocol):
    """A node's entry in a file, with its arrays. Every mismatch raises a `FormatError` that says where it is."""

    def take(self, keys: Types, optional: Types | None = None) -> dict[str, Any]:
        """Return the values of the entry, which must have all of `keys` and may only have `optional` keys in addition.

        Args:
            keys: the required keys with the types of their values.
            optional: the optional keys.
        """
        ...

    def array(self, name: str, shape: tuple[int, ...], bfloat16: bool = False) -> Array | BFloat16Array:
        """Return an array of the entry.

        Args:
            name: the array's name.
            shape: the shape that it must have.
            bfloat16: whether bfloat16 is allowed.
        """
        ...

    def inner(self, name: str, description: Any, kind: str = "") -> Entry:
        """Return a nested entry.

        Args:
            name: the prefix, before a slash, of its arrays' names.
            description: its JSON values.
            kind: the type that it must have; "": it has no type.
        """
        ...

    def node(self, name: str, description: Any) -> Any:
        """Return the `Node` of a nested entry.

        Args:
            name: the prefix, before a slash, of its arrays' names.
            description: its JSON values.
        """
        ...

    def refuse(self, what: str) -> Exception:
        """Return a `FormatError` about this entry."""
        ...
