"""Modules that no Network can express: an ONNX graph with open sizes, whose recurrent operators run on the kernel.

Loops over time with other steps than those of cells run in ONNX Runtime, like all else.

The graph comes from `torch.export`, that of a scripted module from PyTorch's older exporter. It is compared with the
module like a Network.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.export import Dim

from cellstack.capture.attempts import DRAWS, MORE_SCALES, SCALES, caveats, some
from cellstack.capture.axes import Axes, axes_in_groups, longer, resized
from cellstack.capture.complexes import with_real_ends
from cellstack.capture.copied import duplicate
from cellstack.capture.equality import GraphEnds, difference, drawn
from cellstack.capture.export import with_cells
from cellstack.capture.exported import export, without_console
from cellstack.capture.operators import with_checks
from cellstack.capture.packing import packs
from cellstack.capture.prepared import Prepared
from cellstack.capture.probes import compared_sizes, steps_repeated
from cellstack.capture.recording import example_values, recorded, served
from cellstack.capture.unrolled import rolled
from cellstack.capture.writing import first_reason, write
from cellstack.cells.errors import FormatError
from cellstack.formats.onnx.runtime import RuntimeModel
from cellstack.layers import op

NEEDS = "the rest of it would run in ONNX Runtime, which isn't installed: pip install 'cellstack[onnxruntime]'"

NOTHING = "it has no recurrent layer that the kernel runs"
ALL = "without one and without a loop over time, ONNX Runtime would run all of it: call torch.onnx.export for that"


def runtime_model(ready: Prepared, tolerance: float, reason: str) -> tuple[RuntimeModel, list[str]]:
    """Return a module as a graph of which the kernel runs a part, and notes for warnings.

    Args:
        ready: the module.
        tolerance: see `compile`.
        reason: why it isn't a Network.

    Raises:
        FormatError: it can't be exported, has neither a recurrent operator for the kernel nor a loop, or its graph has
            other outputs; or onnxruntime isn't installed.
    """
    if not ready.again:
        raise FormatError(DRAWS)
    if find_spec("onnxruntime") is None:
        raise FormatError(NEEDS)
    module, inputs, tried = duplicate(ready.module), ready.inputs, list[str]()
    strict, left = with_checks(module), list[str]()
    axes = axes_in_groups(strict, inputs, left)
    cut = "torch.export", _by_export, False
    whole = "torch.export of all steps", partial(_by_export, cut=False), True
    cells = "torch.export of hand-written cells", partial(_by_export, serve=with_cells), False
    script = "PyTorch's exporter of scripted modules", _by_script, False
    least, best, packed = math.inf, None, bool(packs(module, inputs))
    loops = "torch.export of loops", partial(_by_export, loops=True, cut=False), packed
    routes = (cut, whole, cells, loops) if packed else (cut, cells, loops)
    if isinstance(module, torch.jit.ScriptModule):
        routes = (script,)
    elif steps_repeated(module, inputs, axes):  # torch.export would record each step
        routes = sorted(routes, key=lambda route: route not in (cells, loops))
    for how, save, padded in routes:
        examples, random = list(_examples(inputs, axes)), None
        for given in examples:
            looks, ends = list[str](), GraphEnds(axes, padded)
            try:
                _call_with_other_sizes(module, given, axes)
                network = _saved(save, module, given, len(ready.answers), ends.axes, looks, reason)
                why = difference(network, strict, inputs, tolerance, MORE_SCALES if looks else SCALES, ends)
            except (FormatError, RuntimeError, ValueError) as error:
                network, why = None, str(error)
            if looks and given is examples[0]:  # perhaps its code has a branch for special values, such as zeros
                random = tuple(drawn(given, torch.Generator().manual_seed(0)))
                examples.append(random)
            if network is None or why is not None:
                tried += [f"{how}: {why}"] if given is not random else []
                continue
            network.path = ready.name
            notes = [*ready.notes, *_notes(network, ends, reason, left)]
            if padded:
                notes.append("packs rows: what it unpacks has all steps of the input, also where no row needs them")
            places = compared_sizes(ends, module, inputs)
            if save is not _by_script:
                places.converted.clear()  # torch.export keeps such a size open, or fixes it in the graph's inputs
            looks = [line for line in looks if line not in places.compared]  # values that are computed from sizes
            made = network, [*notes, *caveats(module, inputs, looks, places)]
            if not ends.rejected:
                return made
            least, best = min((least, best), (len(ends.rejected), made), key=lambda one: one[0])
    if best is None:
        raise FormatError("; ".join([*dict.fromkeys(tried), *([ALL] if any(NOTHING in one for one in tried) else [])]))
    return best


def _examples(inputs: tuple[Any, ...], axes: Sequence[Axes]) -> Iterator[tuple[Any, ...]]:
    """Yield the inputs with longer axes in the place of open ones of length 1, which torch.export fixes; and as given.

    A module may accept another length than 1, but none that isn't a number in its code.
    """
    given = list(inputs)
    for group in axes:
        n, axis, unit = min(group)
        given = resized(given, group, 1) if given[n].shape[axis] == unit else given
    yield tuple(given)
    if any(one is not other for one, other in zip(given, inputs, strict=True)):
        yield inputs


def _call_with_other_sizes(module: Any, inputs: tuple[Any, ...], axes: Sequence[Axes]) -> None:
    """Call a module with one more along each open axis.

    It may keep the sizes of its last call and compare them with those of the next: then `torch.export` would fix them.
    """
    with torch.no_grad(), suppress(Exception):  # it refuses these sizes
        module(*longer(inputs, axes))


def _saved(
    save: Any, module: Any, inputs: tuple[Any, ...], outputs: int, axes: Sequence[Axes], looks: list[str], reason: str
) -> RuntimeModel:
    """Return the graph that a function writes; the places where the module's code reads values are added to `looks`.

    Raises:
        FormatError: it can't be written, isn't valid, or has neither a recurrent operator for the kernel nor a loop.
    """
    names = [f"input_{n}" for n in range(len(inputs))], [f"output_{n}" for n in range(outputs)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "module.onnx")
        try:
            with without_console():
                looks += save(module, inputs, axes, path, *names)
                network = RuntimeModel(path, reason).prepare()
        except Exception as error:  # exporters and ONNX Runtime fail in as many ways as there are modules
            raise FormatError(first_reason(error).removeprefix("export_onnx: ")) from error
    if not network.kernels and not network.loops:
        raise FormatError(NOTHING)
    return network


def _by_export(
    module: Any,
    given: Any,
    axes: Sequence[Axes],
    path: str,
    *names: Any,
    cut: bool = True,
    serve: Any = served,
    loops: bool = False,
) -> list[str]:
    """Write what `torch.export` records of a module; return where its code depends on values."""
    looks = list[str]()
    module, given = with_real_ends(module, given)

    def record(module: Any, given: Any, opened: Sequence[Axes] = axes, nested: bool = True) -> Any:
        shapes = tuple(dict.fromkeys(one, Dim.AUTO) for one in _opened(opened, len(given)))
        return recorded(module, tuple(given), None, (shapes,) if nested else shapes, cut=cut, serve=serve)

    with example_values(looks):
        if loops:
            single = [group for group in axes if min(group)[2] == 1]  # of others, a number of steps may be fixed alone
            program = record(*rolled(lambda given: record(module, given, single), given, axes), nested=False)
        else:
            program = record(module, given)
            if not program.graph.find_nodes(op="call_function", target=op.recurrent):
                raise FormatError(NOTHING)
        write(program, path, *names)
    return looks


def _opened(axes: Sequence[Axes], inputs: int) -> list[list[int]]:
    """Return the axes of each input that may change."""
    return [sorted(axis for m, axis, _ in frozenset().union(*axes) if m == n) for n in range(inputs)]


def _by_script(module: Any, given: Any, axes: Sequence[Axes], path: str, *names: Any) -> list[str]:
    """Write a scripted module."""
    return export(module, given, _opened(axes, len(given)), path, *names)


def _notes(network: RuntimeModel, ends: GraphEnds, reason: str, left: list[str]) -> list[str]:
    """Return warnings: which operators ONNX Runtime runs and why, and which sizes it rejects or may reject."""
    found = re.findall(r"ONNX Runtime: (.*)", str(network.plan()))
    notes = [f"isn't a Network: {reason}; ONNX Runtime runs {'; '.join(found)}: see plan()"]
    if ends.rejected:
        notes.append(f"takes sizes that its graph doesn't have, such as {ends.rejected[0]}")
    if left:
        notes.append(
            f"takes the lengths of the example along {some(left)}: too many axes have the same one to find those that "
            "change together; give an example in which they differ"
        )
    return notes
