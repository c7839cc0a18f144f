"""A network as C99: `export` writes one header and one source (docs/c.md)."""

from cellstack.formats.c.source import export

__all__ = ["export"]
