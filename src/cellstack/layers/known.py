"""x"""
from typing import Any
ADAPTERS: dict[str, Any] = {}
