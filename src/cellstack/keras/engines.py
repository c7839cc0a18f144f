"""What runs calls of Keras's layers in Keras's place: by Keras's backend, which is chosen when Keras is imported."""

from __future__ import annotations

from typing import Any

import keras

NAME: str = keras.backend.backend()

if NAME == "torch":
    from cellstack.keras.torch_backend import concrete, draw, isa, run, run_layer, symbolic, why_not
else:

    def why_not(x: Any, mask: Any) -> str:
        """Say why our op serves no call."""
        return f"on the {NAME} backend, whose loop is compiled"

    def concrete(x: Any) -> bool:
        """Say that nothing is looked at."""
        return False

    def symbolic(x: Any) -> bool:
        """Whether a call only asks for shapes."""
        return isinstance(x, keras.KerasTensor)

    def isa() -> str:
        """Return the instruction set that the kernel would use: none."""
        return ""

    def draw(cells: Any, step: Any) -> None:
        """Leave masks to Keras."""
        raise NotImplementedError

    def run(layer: Any, x: Any, initial_state: Any, mask: Any, training: Any) -> Any:
        """Leave layers to Keras."""
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
        """Run no layer of ours."""
        raise NotImplementedError


def why_not_here() -> str:
    """Say why no call can be served on Keras's backend; "" where calls can."""
    return "" if NAME == "torch" else why_not(None, None)
