"""Compares the outputs of a network with those of its module, for the example and for other values and sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from cellstack.capture.axes import Axes, is_count, resized
from cellstack.capture.copied import duplicate
from cellstack.capture.nested import array_of, fresh, in_order, wider
from cellstack.formats.onnx.runtime import RuntimeModel
from cellstack.formats.runtimes.axes import parted
from cellstack.formats.runtimes.differences import apart
from cellstack.network import Network
from cellstack.network.layouts import Layout, layout_of

STEPS = 4  # in the comparison of a module that computes one step of a cell
LONGER = 250  # additional steps in the comparison of a much longer sequence
MORE_ROWS = 10  # additional rows in the comparison of a larger batch
ONE_ROW, ONE_STEP, MUCH_LONGER = "with one row ", "with one step ", f"with {LONGER} more steps "
FLAGS = "mask"  # name of the input with flags [B, T] of the used steps, where a network has one
NUDGE = 1 + 1e-6  # a factor for the weights, as close to 1 as rounding errors


class Size(NamedTuple):
    """Inputs of another size than the example's.

    Attributes:
        what: the beginning of the message for outputs that differ.
        given: the inputs.
        one: whether an axis has the length 1, which a module's squeeze() may remove.
        long: whether an axis is so much longer that rounding errors may grow.
    """

    what: str
    given: list[Any]
    one: bool = False
    long: bool = False


def difference(
    network: Any,
    module: Any,
    example: tuple[Any, ...],
    tolerance: float,
    scales: tuple[float, ...],
    ends: Ends | GraphEnds | None = None,
) -> str | None:
    """Return how the outputs of a Network or RuntimeModel differ from the module's; None if they don't.

    They are compared for the example, for random inputs of its shape at each scale, and for other shapes.
    """
    generator = torch.Generator().manual_seed(0)
    ends = ends or Ends(network, len(example))

    first = list(example)
    answers = torch.no_grad()(functools.partial(ends.answers, module))
    tries = [(Size("", first), factor) for factor in scales] + [(size, 1.0) for size in ends.longer(first)]
    for (what, given, one, long), factor in ((Size("", first), None), *tries):
        if factor is None:
            expected = answers(first)
        elif accepted := _accepted(answers, _values(given, first, factor, generator)):
            given, expected = accepted
        else:
            continue  # the module doesn't accept these values or this shape
        try:
            ours, states = ends.run(network, given)
        except (TypeError, ValueError) as error:
            if not what:
                return f"the network rejects the example: {error}"
            continue  # the network raises an error for this shape
        except RuntimeError:  # a loop after the first step has none at a length of 1, which ONNX Runtime refuses
            if not one:
                raise
            continue
        why = ends.unlike(ours, states, expected, tolerance, one)
        if why is None:
            continue
        may_be_rounding = given is not first and (long or not what)
        if not may_be_rounding or not _unsteady(
            module, functools.partial(ends.answers, given=given), expected, tolerance
        ):
            return f"{what}{why}"
    return None


def drawn(given: Sequence[Any], generator: torch.Generator) -> list[Any]:
    """Return tensors of random values; integers are between the least and the greatest of the given ones."""

    def draw(t: Any) -> Any:
        if t.is_floating_point() or t.is_complex():
            return torch.randn(t.shape, generator=generator, dtype=t.dtype)
        low, high = int(t.min()), int(t.max())
        return in_order(torch.randint(low, min(high + 1, 2**63 - 1), t.shape, generator=generator).to(t.dtype), t)

    return list(map(draw, given))


def _values(given: list[Any], example: list[Any], factor: float, generator: torch.Generator) -> Iterator[list[Any]]:
    """Yield tensors of random values, of which a module may only accept some.

    The second have no negative values where the example has none: weights of edges, or durations. The last ones have
    the integers that are given, in another order of rows and as they are: masks of which one row is full.
    """
    random = [one * factor if one.is_floating_point() else one for one in drawn(given, generator)]
    yield random
    pairs = zip(random, example, strict=True)
    yield [one.abs() if one.is_floating_point() and bool((known >= 0).all()) else one for one, known in pairs]
    integers = [not (one.is_floating_point() or one.is_complex()) for one in given]
    for shift in (1, 0) if any(integers) else ():
        turned = [one.roll(shift, 0) if one.ndim else one for one in given]
        yield [a if whole else b for whole, a, b in zip(integers, turned, random, strict=True)]


def _accepted(answers: Any, options: Iterable[list[Any]]) -> tuple[list[Any], list[Any]] | None:
    """Return the first inputs for which a module returns finite values, or the last that it accepts, and its outputs.

    None: it accepts none of the inputs.
    """
    accepted = None
    for given in options:
        try:
            accepted = given, answers(given)
        except Exception:  # a module may refuse values or sizes with any error
            continue
        if all(value.isfinite().all() for value in accepted[1] if value.is_floating_point()):
            break
    return accepted


def _unsteady(module: Any, run: Any, expected: list[Any], tolerance: float) -> bool:
    """Return whether a module's output is infinite, or changes by more than the tolerance through rounding alone.

    Rounding errors may grow from step to step and from layer to layer: then float32 doesn't determine the output for a
    long sequence, or for very large inputs.
    """
    nudged = duplicate(module)
    with torch.no_grad():
        for weight in nudged.parameters():
            if weight.is_floating_point():
                weight.mul_(NUDGE)
        moved = run(nudged)
    pairs = [(array_of(a), array_of(b)) for a, b in zip(moved, expected, strict=True)]
    return any(not np.isfinite(b).all() or not agree(a, b, tolerance) for a, b in pairs)


class Ends:
    """How the inputs and outputs of a module correspond to those of its network.

    For a module that was read directly they are the same, in order. For a graph, the network's metadata says which of
    them are states, the axes of each, and whether a call of the module is one step.
    """

    def __init__(self, network: Network, count: int) -> None:
        noted = network.metadata.get("onnx", {})
        self.data = [int(name.partition("_")[2] or 0) for name in noted.get("inputs", ())] or list(range(count))
        self.starts = {int(name.partition("_")[2]): refs for name, refs in noted.get("starts", {}).items()}
        self.states, self.axes = noted.get("states", {}), noted.get("state_axes", {})
        self.outputs: dict[str, str] = noted.get("outputs", {})
        self.steps = noted.get("frames") is not None
        letters = noted.get("inputs", {}).values() if not self.steps else ()
        known = dict(zip(network.inputs, letters, strict=False))
        self.layouts = {
            n: layout_of(network, "inputs", name) or Layout.of(known.get(name, ""))
            for n, name in zip(self.data, network.inputs, strict=False)
        }
        self.returned = {
            name: layout_of(network, "outputs", ours) or Layout.of(axes)
            for ours, (name, axes) in zip(network.outputs, self.outputs.items(), strict=False)
        } or {
            f"output_{n}": layout_of(network, "outputs", ours) or Layout.of("")
            for n, ours in enumerate(network.outputs)
        }
        celled = [name for name, node in zip(network.names, network.nodes, strict=True) if node.cells]
        numbers = [celled.index(name) if name in celled else None for name in network.outputs]
        self.answered = dict(zip(self.outputs, numbers, strict=False))  # the index of the node that returns each output
        counts = [len(node.cells) for node in network.nodes if node.cells]
        self.firsts = [sum(counts[:number]) for number in range(len(counts))]

    def longer(self, given: list[Any]) -> Iterator[Size]:
        """Yield inputs of other sizes."""
        places = [{n: self.axis(n, role, given[n]) for n in self.data} for role in "BT"]
        lengths = [[given[n].shape[at] for n, at in place.items() if at is not None] for place in places]
        rows, steps = (min(found, default=1) for found in lengths)
        tries = (
            (0, 1, "with one more row "),
            (1, 4, "with more steps "),
            (1, -1, "with one step fewer "),
            (0, 1 - rows, ONE_ROW),
            (1, 1 - steps, ONE_STEP),
            (0, MORE_ROWS, f"with {MORE_ROWS} more rows "),
            (1, LONGER, MUCH_LONGER),
        )
        for which, more, what in tries:
            if (which and self.steps) or not more or not lengths[which] or min(lengths[which]) + more < 1:
                continue  # `answers` always computes several steps
            along = {n: at for n, at in places[which].items() if at is not None}
            along |= {n: at for n in self.starts if (at := self.axes[f"input_{n}"].find("BT"[which])) >= 0}
            sized = [wider(value, along[n], more) if n in along else value for n, value in enumerate(given)]
            yield Size(what, sized, what in (ONE_ROW, ONE_STEP), what == MUCH_LONGER)

    def axis(self, n: int, role: str, value: Any) -> int | None:
        """Return which axis of an input is the batch or time; None if none is."""
        axes = self.layouts[n].axes or "BTF"[: value.ndim]
        return axes.index(role) if role in axes else None

    def answers(self, module: Any, given: list[Any]) -> list[Any]:
        """Return the outputs of a module as a list; if a call is one step, those of several steps."""
        if not self.steps:
            return list(module(*fresh(given)))
        made: list[list[Any]] = []
        after = self._next_states()
        for t in range(STEPS):
            now = [value.roll(t, -1) if n in self.data else value for n, value in enumerate(given)]
            if made:
                now = [made[-1][after[n]] if n in after else value for n, value in enumerate(now)]
            made.append(list(module(*fresh(now))))
        last = made[-1]
        return [
            torch.stack([step[n] for step in made], 1) if f"output_{n}" in self.outputs else last[n]
            for n in range(len(last))
        ]

    def _next_states(self) -> dict[int, int]:
        """Return, for each input that is a state, the index of the output that is this state after a step."""
        ends = {tuple(map(tuple, refs)): name for name, refs in self.states.items()}
        # An h that is also an output of the network isn't among the states.
        ends |= {((number, 0, "h"),): name for name, number in self.answered.items() if number is not None}
        found = {n: ends.get(tuple(map(tuple, refs))) for n, refs in self.starts.items()}
        return {n: int(name.partition("_")[2]) for n, name in found.items() if name is not None}

    def run(self, network: Network, given: list[Any], lengths: Any = None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the outputs and the final states of a network, for the inputs of the module and the rows' lengths."""
        arrays = [self.layouts[n].to_network(array_of(given[n])) for n in self.data]
        if self.steps:
            arrays = [np.stack([np.roll(array, t, -1) for t in range(STEPS)], 1) for array in arrays]
        states: list[Any] = [None] * len(network.cells)
        kept = [dict.fromkeys(cell.spec.state_sizes) for cell in network.cells]
        for n, refs in self.starts.items():
            for ref, part in zip(refs, parted(array_of(given[n]), self.axes[f"input_{n}"]), strict=False):
                if ref is not None:
                    kept[self.firsts[ref[0]] + ref[1]][ref[2]] = part
        for n, (own, cell) in enumerate(zip(kept, network.cells, strict=True)):
            lacks = [name for name, part in own.items() if part is None]
            if lacks and len(lacks) < len(own):
                if cell.spec.learn_initial_state:
                    raise ValueError(f"a cell is given only a part of its state, but has a learned initial {lacks[0]}")
                own |= {name: np.zeros((len(arrays[0]), cell.spec.state_sizes[name]), network.dtype) for name in lacks}
            states[n] = tuple(own.values()) if len(lacks) < len(own) else None
        if FLAGS in network.inputs:
            arrays.append(np.arange(arrays[0].shape[1]) < np.reshape(lengths, (-1, 1)))
            lengths = None
        x = tuple(arrays) if len(arrays) > 1 else arrays[0]
        ours, after = network.run(x, states if self.starts else None, lengths=lengths)
        return ours if isinstance(ours, tuple) else (ours,), after

    def unlike(
        self,
        ours: tuple[Any, ...],
        states: tuple[Any, ...],
        expected: list[Any],
        tolerance: float,
        squeezed: bool = False,
    ) -> str | None:
        """Return how the network's outputs differ from the module's; None if they are the same outputs.

        Outputs of the module that aren't outputs of the network, in order, must be among the network's last states,
        `[B, H]` or stacked. If the module may have `squeezed` axes of length 1 out of its outputs, only values are
        compared.
        """
        same = functools.partial(agree, tolerance=tolerance, squeezed=squeezed)
        parts = [part for state in states for part in state]
        left = list(ours)
        for n, wanted in enumerate(expected):
            theirs = array_of(wanted)
            name = f"output_{n}"
            layout = self.returned.get(name, Layout.of(""))
            noted = self.axes[name] if name in self.states else layout.axes
            if squeezed and theirs.ndim < len(noted) and (name in self.states or noted[:1] in ("1", "D")):
                return None  # which axis of the state is missing isn't known
            if squeezed and left and theirs.ndim < len(noted):
                ones = {"1", *(axis for axis, length in zip("BT", left[0].shape, strict=False) if length == 1)}
                layout = Layout.of("".join(axis for axis in noted if axis not in ones))
            if name not in self.states:
                theirs = layout.to_network(theirs, len(ours[0]))
            if theirs.ndim == 1 and left and left[0].shape == (*theirs.shape, 1):  # one number per row
                theirs = theirs[:, None]
            if left and name not in self.states and same(left[0], theirs):
                left.pop(0)
                continue
            if name in self.states:
                rows = list(parted(theirs, self.axes[name]))
                own = [getattr(states[self.firsts[ref[0]] + ref[1]], ref[2]) for ref in self.states[name]]
                for row, part in zip(rows, own, strict=True):
                    if not same(part, row):
                        off = f"{_off(part, row):.1e}, more than {tolerance:.0e}"
                        return f"output {n}, a state, differs from the module's by {off}"
                continue
            rows = list(theirs) if theirs.ndim == 3 else [theirs]
            if not all(any(same(part, row) for part in parts) for row in rows):
                if not left:
                    return f"the network doesn't return output {n} of the module, {list(theirs.shape)}"
                if left[0].shape != theirs.shape:
                    return f"output {n} has the shape {left[0].shape}, the module's {theirs.shape}"
                return f"output {n} differs from the module's by {_off(left[0], theirs):.1e}, more than {tolerance:.0e}"
        return f"the network has {len(left)} more outputs than the module" if left else None


class GraphEnds:
    """How the inputs and outputs of a module correspond to those of its ONNX graph: they are the same, in order.

    Args:
        axes: the axes of the inputs that may change, in groups that change together.
        padded: whether an output may have more entries along an axis than the module's.
    """

    def __init__(self, axes: Sequence[Axes], padded: bool = False) -> None:
        self.axes, self.padded = axes, padded
        self.rejected: list[str] = []  # sizes that the graph doesn't have

    def longer(self, given: list[Any]) -> Iterator[Size]:
        """Yield inputs of other sizes, of which the first has rows of several lengths."""
        sizes = {size for value in given for size in value.shape}
        uneven = [
            torch.linspace(int(one[0]), 1 + int(one[0]) // 4, len(one)).to(one.dtype)
            if one.ndim == 1 and len(one) > 1 and is_count(one) and int(one[0]) in sizes and (one == one[0]).all()
            else one
            for one in given
        ]
        if any(one is not other for one, other in zip(uneven, given, strict=True)):
            yield Size("with shorter rows ", uneven)
        for group in self.axes:
            n, axis, _ = min(group)
            size = min(given[m].shape[at] // unit for m, at, unit in group)
            changes = dict.fromkeys((1, 4, -1, MORE_ROWS, 1 - size, LONGER))
            for more in changes:
                if more and size + more > 0:
                    what = f"with {abs(more)} {'more' if more > 0 else 'fewer'} along axis {axis} of input {n} "
                    yield Size(what, resized(given, group, more), size + more == 1, more == LONGER)

    def answers(self, module: Any, given: list[Any]) -> list[Any]:
        """Return the outputs of a module as a list."""
        return list(module(*fresh(given)))

    def run(self, network: RuntimeModel, given: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the outputs of a graph, and no states.

        Raises:
            ValueError: the graph has another fixed size.
            RuntimeError: ONNX Runtime fails, although the graph has open sizes.
        """
        arrays = list(map(array_of, given))
        for array, one in zip(arrays, network.arguments(network.inputs), strict=True):
            if any(isinstance(size, int) and size != own for size, own in zip(one.shape, array.shape, strict=True)):
                self.rejected.append(f"{list(array.shape)} for {one.name} {one.shape}")
                raise ValueError(f"its graph doesn't take {self.rejected[-1]}")
        options = import_module("onnxruntime").RunOptions()
        options.log_severity_level = 4  # it would print errors
        try:
            return tuple(network.compute(dict(zip(network.inputs, arrays, strict=True)), options)), ()
        except Exception as error:  # ONNX Runtime's errors have no common base class
            sizes = ", ".join(str(list(array.shape)) for array in arrays)
            self.rejected.append(sizes)
            raise RuntimeError(f"its graph fails for {sizes}: {str(error).splitlines()[0]}") from error

    def unlike(
        self, ours: tuple[Any, ...], _: Any, expected: list[Any], tolerance: float, squeezed: bool = False
    ) -> str | None:
        """Return how the outputs of a graph differ from the module's; None if they are the same."""
        if len(ours) != len(expected):
            return f"the graph has {len(ours)} outputs, the module {len(expected)}"
        for n, (own, wanted) in enumerate(zip(ours, map(array_of, expected), strict=True)):
            if squeezed:
                own, wanted = own.squeeze(), wanted.squeeze()
            if self.padded and own.ndim == wanted.ndim:
                own = own[tuple(map(slice, wanted.shape))]
            if (own.dtype, own.shape) != (wanted.dtype, wanted.shape):
                return f"output {n} is {own.dtype} {list(own.shape)}, the module's {wanted.dtype} {list(wanted.shape)}"
            if not agree(own, wanted, tolerance):
                return f"output {n} differs from the module's by {_off(own, wanted):.1e}, more than {tolerance:.0e}"
        return None


def agree(ours: Any, theirs: Any, tolerance: float, squeezed: bool = False) -> bool:
    """Return whether two arrays have the same shape, and the same values within the tolerance."""
    if squeezed:
        ours, theirs = ours.squeeze(), theirs.squeeze()
    return ours.shape == theirs.shape and _off(ours, theirs) <= tolerance


def _off(ours: Any, theirs: Any) -> float:
    """Return the greatest difference of two arrays of the same shape, relative to the largest value of `theirs`."""
    differences, largest = apart(ours, theirs)
    return float(differences.max(initial=0.0)) / max(largest, 1e-30)
