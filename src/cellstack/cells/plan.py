"""What `plan()` returns: which implementation runs each part, and why."""


class Plan(tuple[str, ...]):
    """Which kernel runs each part, and why: a tuple of lines; its repr is these lines.

    >>> Plan(["layer_0: fused kernel", "layer_1: NumPy"])
    layer_0: fused kernel
    layer_1: NumPy
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(self)
