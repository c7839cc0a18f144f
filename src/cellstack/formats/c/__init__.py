"""Export of a network as C99: `export` writes one header and one source file (docs/c.md)."""

from cellstack.formats.c.source import export

__all__ = ["export"]
