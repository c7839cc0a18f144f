"""Reads what a torch module is, its weights and settings, whether it is in memory or in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.cells.spec import DTYPES
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.saved import Saved
from cellstack.formats.pytorch.tensors import array
from cellstack.formats.pytorch.tree import COMPUTING


def called(module: Any) -> str:
    """Return the name of a module's class, or its path in the file, for messages."""
    return module.path if isinstance(module, Saved) else type(module).__name__


def refuse(path: str, module: Any, why: str) -> TypeError:
    """Return the error for a module that isn't supported, to be raised."""
    return TypeError(f"load: {path or 'the module'} ({called(module)}): {why}")


@contextmanager
def refusing(path: str, module: Any) -> Iterator[None]:
    """Add the module's name to errors of its node or its weights."""
    try:
        yield
    except ValueError as error:
        raise refuse(path, module, str(error)) from None


def is_a(module: Any, *names: str, package: str = "torch.nn") -> bool:
    """Return whether `module` is of one of these classes, with the class's own forward pass."""
    if isinstance(module, Saved):
        return package.startswith(module.package) and module.kind in names
    classes = [getattr(sys.modules.get(package), name, None) for name in names]
    if "forward" in getattr(module, "__dict__", {}):
        return False
    own = getattr(type(module), "_class_before", type(module))  # the original class of an accelerated module
    return any(isinstance(module, kind) and own.forward is kind.forward for kind in classes if kind is not None)


def as_array(path: str, module: Any, tensor: Any) -> Array:
    """Return a tensor of a module; raise an error if it isn't float32 or float64."""
    if isinstance(module, Saved):
        return array(tensor)
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise refuse(path, module, f"expected weights in {' or '.join(DTYPES)}, got {tensor.dtype}")
    return np.array(np.asarray(tensor))


def weights_of(path: str, module: Any) -> dict[str, Any]:
    """Return the weights of a module by name; those in pieces are computed anew, not taken from a hook's last call."""
    if isinstance(module, Saved):
        return module.tensors
    own = {name: value.detach().cpu() for name, value in (*module.named_parameters(), *module.named_buffers())}
    known, custom = dict(own), getattr(module, "parametrizations", {})
    axes = {hook.name: hook.dim for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "SpectralNorm"}
    for name, steps in custom.items():
        if len(steps) != 1 or type(steps[0]).__name__ not in ("_WeightNorm", "_SpectralNorm"):
            known = {key: value for key, value in known.items() if not key.startswith(f"parametrizations.{name}.")}
            known[name] = getattr(module, name).detach().cpu()
        elif type(steps[0]).__name__ == "_SpectralNorm":
            axes[name] = steps[0].dim
    with refusing(path, module):
        return joined(known, path, axes=axes)


def weight_of(path: str, module: Any, name: str) -> Array | None:
    """Return a weight of a module; None if it has none of that name."""
    found = weights_of(path, module).get(name)
    if found is None and getattr(module, name) is not None:
        raise refuse(path, module, f"expected {name} to be a parameter or a buffer")
    return None if found is None else as_array(path, module, found)


def whole(path: str, module: Any, name: str) -> int:
    """Return a setting for one axis, which torch stores as a number or as a tuple of one."""
    value = getattr(module, name)
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    if not isinstance(value, int):
        raise refuse(path, module, f"expected {name} to be a number, got {value!r}")
    return value


def kernel_of(path: str, module: Any) -> Array:
    """Return the weight of a module; raise an error if it has none."""
    found = weight_of(path, module, "weight")
    if found is None:
        raise refuse(path, module, "expected a weight, got none")
    return found


def hooked(module: Any) -> bool:
    """Return whether a module has hooks other than those that compute a weight."""
    if isinstance(module, Saved):
        return module.hooked
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(COMPUTING.fullmatch(f"{type(hook).__module__}.{type(hook).__name__}") for hook in hooks)


def child_of(path: str, module: Any, name: str) -> Any:
    """Return the child of a module with that name."""
    found = module._modules.get(name)
    if found is None:
        raise refuse(path, module, f"expected a child module {name}, found none")
    return found
