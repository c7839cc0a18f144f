"""Select the implementation for Keras's backend, which is fixed when Keras is imported: only torch is supported."""

from __future__ import annotations

from typing import Any

import keras

NAME: str = keras.backend.backend()

if NAME == "torch":
    from cellstack.keras.torch_backend import concrete, draw, isa, run, run_layer, symbolic, why_not
else:

    def why_not(x: Any, mask: Any) -> str:
        """Return why the kernel runs no call."""
        return f"on the {NAME} backend, whose loop is compiled"

    def concrete(x: Any) -> bool:
        """Return False: no call is run here."""
        return False

    def symbolic(x: Any) -> bool:
        """Whether a call only infers shapes."""
        return isinstance(x, keras.KerasTensor)

    def isa() -> str:
        """Return "": the kernel isn't used."""
        return ""

    def draw(cells: Any, step: Any) -> None:
        """Not supported on this backend."""
        raise NotImplementedError

    def run(layer: Any, x: Any, initial_state: Any, mask: Any, training: Any) -> Any:
        """Not supported on this backend."""
        raise NotImplementedError

    def run_layer(
        spec: Any,
        x: Any,
        states: Any,
        arrays: Any,
        drops: Any,
        mask: Any,
        reset: Any,
        reverse: bool,
        traced: bool,
    ) -> Any:
        """Not supported on this backend."""
        raise NotImplementedError


def why_not_here() -> str:
    """Return why the kernel runs no call on Keras's backend; "" if it can."""
    return "" if NAME == "torch" else why_not(None, None)
