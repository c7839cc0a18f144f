"""Converts a PyTorch module to a network for inference, directly or by exporting it to ONNX, and compares the two."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cellstack.formats import onnx
from cellstack.formats.build import HINT
from cellstack.formats.exported import export, remedy, shortened
from cellstack.formats.pytorch import network_of_module
from cellstack.formats.pytorch.modules import KNOWN
from cellstack.formats.runtimes import ordered, parted
from cellstack.formats.sizes import Places, compared
from cellstack.network import Network
from cellstack.spec import FormatError

TOLERANCE = 1e-4  # of the relative difference: float32 on both sides, with sums in different orders
SCALES = (1.0, 0.01, 10.0)  # of the random inputs for the comparison
MORE_SCALES = (*SCALES, -1e-3, 0.1, 0.3, -1.0, 3.0, 30.0, -100.0, 1e3)  # if a module's code depends on values
MOST_WAYS = 30  # combinations of axes of several inputs that are tried
STEPS = 4  # in the comparison of a module that computes one step of a cell
LONGER = 250  # additional steps in the comparison of a much longer sequence
MORE_ROWS = 10  # additional rows in the comparison of a larger batch
ONE_ROW, ONE_STEP, MUCH_LONGER = "with one row ", "with one step ", f"with {LONGER} more steps "
NUDGE = 1 + 1e-6  # a factor for the weights, as close to 1 as rounding errors
BATCH_FIRST = (
    "it has layers with batch_first=False, but a Network takes batch before time: set batch_first=True, with the same "
    "weights, and pass an example [B, T, I]"
)
TIME_FIRST = (
    "it takes time before batch, but a Network takes batch before time: compile a wrapper whose forward calls it with "
    "x.transpose(0, 1) and transposes the sequences that it returns, and pass an example [B, T, I]"
)


def compile(module: Any, example: Any, tolerance: float = TOLERANCE) -> Network:
    """Convert a PyTorch module to a Network, which runs without PyTorch, streams, and can be saved in any format.

    The module is read by `from_torch` or, if that isn't possible, exported to ONNX. The outputs of the network are then
    compared with those of the module: for the example, for other values of the same shape, and for other sizes that
    both accept: one row, more rows, one step, one step fewer, and up to 250 more steps. The comparison uses a copy of
    the module in evaluation mode, converted to float32 if it has weights in float16 or bfloat16.

    Args:
        module: the module; it may be accelerated.
        example: an input of the module, such as `[B, T, I]`; several as one tuple, which may hold tuples, as in
            `(x, (h, c))`. The initial state of a recurrent layer becomes the argument `state` of the network's `run`.
        tolerance: the greatest relative difference of an output that is accepted.

    Returns:
        The network, with inputs and outputs in the module's order. Final states that the module returns are among those
        that `Network.run` returns; a state is an output `[B, H]` if the module uses nothing else of its layer. A module
        that computes one step of a cell, as in `model(x, h, c)` with `x [B, I]`, becomes a network over sequences.

    If the module's code reads values of tensors, as in `if x.sum() > 0`, or compares sizes of its input, as in
    `if x.shape[1] > 4`, and the outputs agree nonetheless, a warning lists the lines. Uses of `len` and of step
    numbers, as in `if t == 300`, are only found if the outputs differ for one of the sizes above.

    Raises:
        TypeError: `module` isn't a module, the example isn't a tensor, or the tolerance isn't a number.
        ValueError: the example is empty, the module itself rejects it, or returns NaN for it.
        FormatError: neither way leads to a network with the module's outputs; the message gives the reason for each.
        ModuleNotFoundError: the export needs onnx or onnxscript, which aren't installed.

    >>> import torch
    >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> compile(module, torch.zeros(2, 5, 3)).run(np.ones((1, 6, 3), np.float32))[0].shape
    (1, 6, 4)
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"compile: expected a module of PyTorch, got {type(module).__name__}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(
            f"compile: expected tolerance to be a number, got {type(tolerance).__name__}: "
            "several inputs go into example as one tuple"
        )
    inputs = example if isinstance(example, tuple) else (example,)
    if _holds_a_dict(inputs):
        raise TypeError(
            "compile: expected example to be a tensor, or a tuple of tensors, got a dict: pass a module whose forward "
            "takes the tensors as arguments and builds the dict"
        )
    flat = _tensors(inputs)
    if not flat or not all(isinstance(value, torch.Tensor) for value in flat):
        got = f"a tuple of {', '.join(type(v).__name__ for v in flat)}" if isinstance(example, tuple) else None
        raise TypeError(
            "compile: expected example to be a tensor, or a tuple of tensors, as the module takes them, "
            f"got {got or type(example).__name__}"
        )
    if not all(value.numel() for value in flat):
        shapes = " and ".join(str(list(value.shape)) for value in flat)
        raise ValueError(f"compile: expected an example with at least one row and one step, got {shapes}")
    try:
        still = copy.deepcopy(module).eval()
    except Exception as error:  # a module may hold anything
        raise FormatError(f"compile: {type(module).__name__} can't be copied: {error}") from error
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in still.parameters()):
        still = still.float()
        inputs = _like(inputs, (value.float() if value.is_floating_point() else value for value in flat))
    if any(part.is_meta for part in (*flat, *still.parameters(), *still.buffers())):
        raise FormatError(
            f"compile: {type(module).__name__} is on the device 'meta', which stores no values: load its weights, by "
            "module.to_empty(device='cpu') and module.load_state_dict(...), and pass an example on the CPU"
        )
    packs, answers, again = _first(still, inputs)
    if any(isinstance(a, torch.Tensor) and a.is_floating_point() and bool(a.isnan().any()) for a in answers):
        raise ValueError(
            f"compile: {type(module).__name__} itself returns NaN for the example, so there is nothing to compare "
            "with: check its weights, and give an example for which it returns numbers"
        )
    reasons = []
    if not again:
        reasons.append(
            "a second call with the same input gives another output: it draws random numbers, or keeps a state between "
            "calls; let forward take and return the state, and draw no numbers"
        )
    if packs:
        reasons.append(
            "it packs sequences, which can't be exported: pass a module that takes padded sequences, without lengths; "
            "net(x, mask=...) then ignores the padding, as packing does"
        )
    elif _time_first(still, inputs):
        reasons.append(BATCH_FIRST if _plain(still) else TIME_FIRST)
    tried: list[str] = []
    looks: list[str] = []
    places: list[str] = []
    for how, read in (("read directly", _directly), ("exported to ONNX", _by_onnx)):
        if read is _by_onnx and packs:
            continue
        try:
            network = read(still, inputs, answers, looks)
            why = _difference(network, still, inputs, tolerance, MORE_SCALES if looks else SCALES)
            if why is None and again:
                if looks and _reads(still, inputs):
                    warnings.warn(
                        f"compile: {type(module).__name__} reads values of tensors ({_some(looks)}), and the "
                        "network does what it did for the example: the outputs for other values that were tried agree, "
                        "but not all values can be tried",
                        stacklevel=2,
                    )
                places = _compared_sizes(network, still, inputs).compared if read is _by_onnx else []
                if places:
                    warnings.warn(
                        f"compile: {type(module).__name__} compares sizes of its input ({_some(places)}), and "
                        "the network does what it did for the example's sizes: it agrees for the other sizes that "
                        "were tried, but may differ for sizes that weren't",
                        stacklevel=2,
                    )
                return network
            why = why or "its output equals that of the module's first call"
            loops = network.metadata.get("onnx", {}).get("unrolled", {})
            if loops and why.startswith("with more steps"):
                name, (count, what) = next(iter(loops.items()))
                reasons.append(
                    f"its loop over {name} {what}, which a Network only supports for a fixed number of steps, "
                    f"{count} here: fix the number in forward, or compile a module of one step and stream it"
                )
            other = "has the shape" in why or why.startswith(("with more steps", MUCH_LONGER))
            if other and not reasons and _loops(still, inputs):
                reasons.append(
                    "its loop skips steps, treats some of them differently, or doesn't join them by "
                    "torch.stack(ys, 1): a Network does the same at every step, and returns all steps"
                )
            measured: list[str] = []
            if read is _by_onnx and why.startswith("with "):
                places, measured = _compared_sizes(network, still, inputs)
                if places:
                    reasons.append(
                        f"it compares sizes of its input ({_some(places)}), but a graph only contains what it "
                        "did for the example's sizes: do the same for all sizes, or compile a module for each case",
                    )
            if measured and not reasons:
                reasons.append(
                    f"its outputs differ for other sizes, perhaps because of len(x) ({_some(measured)}): a graph only "
                    "contains what it did for the example's sizes"
                )
            turned = [axes for axes in network.metadata.get("onnx", {}).get("inputs", {}).values() if axes[:2] == "TB"]
            if turned and not reasons:
                reasons.append(TIME_FIRST)
        except (TypeError, ValueError, FormatError) as error:
            why = str(error)
        if read is _by_onnx:
            if looks and not packs and (not places or _reads(still, inputs)):
                reasons.append(
                    f"it reads values of tensors ({_some(looks)}), but a graph only contains what it did for the "
                    "example: write it without if, while, float() and numpy(), for instance by torch.where"
                )
            known = remedy(why)
            if known and not reasons:
                reasons.append(known)
            why = shortened(why) if reasons else why
        tried.insert(0, f"{how}: {why}")
    raise FormatError(f"compile: {type(module).__name__} can't be a Network: " + "; ".join(reasons + tried))


def _some(places: list[str]) -> str:
    return ", ".join(places[:3])


def _holds_a_dict(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, (tuple, list)) and any(map(_holds_a_dict, value)))


def _first(module: Any, inputs: tuple[Any, ...]) -> tuple[bool, list[Any], bool]:
    """Run a module twice.

    Returns:
        Whether it passes packed rows to a recurrent layer, its outputs, and whether the second call returns them again.

    Raises:
        ValueError: the module rejects the inputs.
    """
    import torch

    packed = []

    def look(_: Any, given: tuple[Any, ...]) -> None:
        packed.extend(value for value in given if isinstance(value, torch.nn.utils.rnn.PackedSequence))

    parts = [part for part in module.modules() if isinstance(part, torch.nn.RNNBase)]
    hooks = [part.register_forward_pre_hook(look) for part in parts]
    try:
        with torch.no_grad():
            answers, second = (_tensors(module(*_fresh(inputs))) for _ in range(2))
    except Exception as error:  # a module may raise any exception
        raise ValueError(
            f"compile: {type(module).__name__} itself rejects the example: {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    same = [
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-6, equal_nan=True)
        for one, other in zip(answers, second, strict=False)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    ]
    return bool(packed), answers, all(same)


def _plain(module: Any) -> bool:
    """Return whether all parts of a module are PyTorch's classes or ours: no custom `forward` may permute axes."""
    return all(type(part).__module__.startswith(("torch.", "cellstack.")) for part in module.modules())


def _time_first(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether the first axis of a module's input is the time of all its layers with `batch_first=False`.

    It isn't if `forward` permutes the axes before it calls the layers.
    """
    import torch

    parts = [p for p in module.modules() if isinstance(p, torch.nn.RNNBase) and not p.batch_first]
    first, *others = _tensors(inputs)

    def lengths(x: Any) -> list[int]:
        """Return the length of the first axis of each layer's input, given the first input of the module."""
        found: list[int] = []

        def look(_: Any, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], torch.Tensor) and given[0].ndim == 3:
                found.append(given[0].shape[0])

        hooks = [part.register_forward_pre_hook(look) for part in parts]
        try:
            with torch.no_grad():
                module(*_fresh(_like(inputs, [x, *others])))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    before = lengths(first) if parts else []
    for axis in (0, 1) if before and first.ndim > 1 else ():
        try:
            after = lengths(_wider(first, axis, 1))
        except Exception:  # the module accepts no other length of this axis
            after = []
        if after:
            return all((old != new) == (axis == 0) for old, new in zip(before, after, strict=False))
    return bool(before) and all(length == len(first) for length in before)


def _compared_sizes(network: Network, module: Any, example: tuple[Any, ...]) -> Places:
    """Return where a module's code compares sizes of its input."""
    first = _tensors(example)
    others = [given for _, given in _Ends(network, len(first)).longer(first)]
    try:
        return compared(lambda given: module(*_fresh(_like(example, given))), first, others)
    except Exception as error:  # code may reject sizes that aren't plain integers
        warnings.warn(
            f"compile: whether {type(module).__name__} compares sizes of its input can't be checked: {error}",
            stacklevel=3,
        )
        return Places([], [])


def _unsteady(module: Any, run: Any, expected: list[Any], tolerance: float) -> bool:
    """Return whether a module's output is infinite, or changes by more than the tolerance through rounding alone.

    Rounding errors may grow from step to step: then float32 doesn't determine the output for a long sequence.
    """
    import torch

    nudged = copy.deepcopy(module)
    with torch.no_grad():
        for weight in nudged.parameters():
            if weight.is_floating_point():
                weight.mul_(NUDGE)
        moved = run(nudged)
    pairs = [(_array(a), _array(b)) for a, b in zip(moved, expected, strict=True) if isinstance(b, torch.Tensor)]
    return any(not np.isfinite(b).all() or not _same(a, b, tolerance) for a, b in pairs)


def _reads(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a module reads values from its tensors, as `if` and `float()` do; sizes don't count."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    read = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                read.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Look():
        module(*_fresh(inputs))
    return bool(read)


def _directly(module: Any, inputs: tuple[Any, ...], *_: list[Any]) -> Network:
    """Return the network that `from_torch` returns."""
    try:
        network = network_of_module(module)
    except TypeError as error:  # most modules are custom classes, which may still be exported to ONNX
        raise TypeError(str(error).replace(KNOWN, "a custom class without to_nodes()")) from error
    if len(_tensors(inputs)) != len(network.inputs):
        raise TypeError("it takes states or other inputs in addition to x")
    return network


def _by_onnx(module: Any, inputs: tuple[Any, ...], answers: list[Any], looks: list[str]) -> Network:
    """Return the network of a module's ONNX graph, for any batch size and number of steps if the graph allows it.

    The graph's inputs and outputs are named `input_n` and `output_n`, by their index among the tensors. The places
    where the module's code reads values are added to `looks`.
    """
    import torch

    for n, value in enumerate(answers):
        if value is not None and not isinstance(value, torch.Tensor):
            raise FormatError(_no_tensor(n, value))
    flat = _tensors(inputs)
    names = [f"input_{n}" for n in range(len(flat))] if len(flat) > 1 else ["input"]
    axes = {
        name: {axis: f"{name}_{axis}" for axis in free}
        for name, free in zip(names, _free(module, inputs), strict=True)
        if free
    }
    outs = [f"output_{n}" for n, value in enumerate(answers) if value is not None]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "module.onnx")
        options = {"input_names": names, "output_names": outs, "dynamic_axes": axes}
        looks += export(_as_one_step(module, inputs), _fresh(inputs), path, options)
        try:
            return onnx.read_whole(path, whole_loops=True)
        except FormatError as error:
            raise FormatError(str(error).replace(path, "its graph").removesuffix(f"; {HINT}")) from error


def _free(module: Any, inputs: tuple[Any, ...]) -> list[list[int]]:
    """Return, for each input tensor of a module, which of its first two axes may have another length.

    To test an axis, it is made longer by one, alone or together with axes of the same length in other tensors.
    """
    import torch

    flat = _tensors(inputs)

    def takes(grown: dict[int, int]) -> bool:
        given = [_wider(value, grown[n], 1) if n in grown else value for n, value in enumerate(flat)]
        try:
            with torch.no_grad():
                module(*_fresh(_like(inputs, given)))
        except Exception:  # the module rejects these lengths
            return False
        return True

    def may_change(n: int, axis: int) -> bool:
        if takes({n: axis}):
            return True
        others: dict[tuple[int, ...], list[int]] = {}  # tensors of one shape change together
        for m, value in enumerate(flat):
            if m != n:
                others.setdefault(tuple(value.shape), []).append(m)
        ways = [
            [None, *(other for other in range(min(2, len(shape))) if shape[other] == flat[n].shape[axis])]
            for shape in others
        ]
        for way in itertools.islice(itertools.product(*ways), MOST_WAYS):
            more = {m: at for group, at in zip(others.values(), way, strict=True) if at is not None for m in group}
            if more and takes({**more, n: axis}):
                return True
        return False

    found = []
    for n, value in enumerate(flat):
        if value.ndim > 2:
            found.append([axis for axis in (0, 1) if len(flat) == 1 or may_change(n, axis)] or [0, 1])
        else:
            found.append([0, 1] if value.ndim == 2 and len(flat) == 1 and takes({0: 1}) else [])
    return found


def _calls(module: Any, parts: list[Any], inputs: tuple[Any, ...]) -> int:
    """Return how often a call of a module calls one of `parts`, for the part that is called most often."""
    import torch

    counts = dict.fromkeys(map(id, parts), 0)

    def count(part: Any, _: Any) -> None:
        counts[id(part)] += 1

    hooks = [part.register_forward_pre_hook(count) for part in parts]
    try:
        with torch.no_grad():
            module(*_fresh(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return max(counts.values(), default=0)


def _loops(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a call of a module calls a cell several times."""
    import torch

    return _calls(module, [part for part in module.modules() if isinstance(part, torch.nn.RNNCellBase)], inputs) > 1


def _as_one_step(module: Any, inputs: tuple[Any, ...]) -> Any:
    """Return a module whose call is one step, changed so that its cells are exported as operators with known states.

    PyTorch exports an nn.GRUCell and an nn.RNNCell as sums and products, in which states can't be recognised.
    """
    import torch

    flat = _tensors(inputs)
    cells = [part for part in module.modules() if isinstance(part, torch.nn.RNNCellBase)]
    if flat[0].ndim != 2 or _calls(module, cells, inputs) != 1:
        return module

    def once(cell: Any, input: Any, hx: Any = None) -> Any:
        if hx is None or input.ndim != 2:
            return type(cell).forward(cell, input, hx)
        mode = "gru" if isinstance(cell, torch.nn.GRUCell) else f"rnn_{cell.nonlinearity}"
        weights = [cell.weight_ih, cell.weight_hh, *((cell.bias_ih, cell.bias_hh) if cell.bias else ())]
        run = getattr(torch._VF, mode)
        return run(input[None], hx[None], weights, cell.bias, 1, 0.0, False, False, False)[1][0]

    stepped = copy.deepcopy(module)
    for part in stepped.modules():
        if isinstance(part, (torch.nn.GRUCell, torch.nn.RNNCell)):
            part.forward = functools.partial(once, part)
    return stepped


def _difference(
    network: Network, module: Any, example: tuple[Any, ...], tolerance: float, scales: tuple[float, ...]
) -> str | None:
    """Return how the network's outputs differ from the module's; None if they don't.

    They are compared for the example, for random inputs of its shape at each scale, and for other shapes.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    ends = _Ends(network, len(_tensors(example)))

    def drawn(given: list[Any]) -> list[Any]:
        return [torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t for t in given]

    first = _tensors(example)

    def times(given: list[Any], factor: float) -> list[Any]:
        return [value * factor if value.is_floating_point() else value for value in given]

    tries = [("", first), *(("", times(drawn(first), factor)) for factor in scales)]
    for what, given in (*tries, *((words, drawn(more)) for words, more in ends.longer(first))):
        alone = what in (ONE_ROW, ONE_STEP)  # then a module's squeeze() may remove an axis
        try:
            with torch.no_grad():
                expected = ends.answers(module, example, given)
        except Exception:
            if given is first:
                raise
            continue  # the module doesn't accept these values or this shape
        try:
            ours, states = ends.run(network, given)
        except (TypeError, ValueError) as error:
            if not what:
                return f"the network rejects the example: {error}"
            continue  # the network raises an error for this shape
        why = ends.unlike(ours, states, expected, tolerance, alone)
        if why is not None and what == MUCH_LONGER:
            answers = functools.partial(ends.answers, example=example, given=given)
            if _unsteady(module, answers, expected, tolerance):
                continue
        if why is not None:
            return f"{what}{why}"
    return None


class _Ends:
    """How the inputs and outputs of a module correspond to those of its network.

    For a network of `from_torch` they are the same, in order. For a graph, the network's metadata says which of them
    are states, the axes of each, and whether a call of the module is one step.
    """

    def __init__(self, network: Network, count: int) -> None:
        noted = network.metadata.get("onnx", {})
        self.data = [int(name.partition("_")[2] or 0) for name in noted.get("inputs", ())] or list(range(count))
        self.starts = {int(name.partition("_")[2]): refs for name, refs in noted.get("starts", {}).items()}
        self.states, self.axes = noted.get("states", {}), noted.get("state_axes", {})
        self.outputs: dict[str, str] = noted.get("outputs", {})
        self.steps = noted.get("frames") is not None
        celled = [name for name, node in zip(network.names, network.nodes, strict=True) if node.cells]
        numbers = [celled.index(name) if name in celled else None for name in network.outputs]
        self.answered = dict(zip(self.outputs, numbers, strict=False))  # the index of the node that returns each output
        counts = [len(node.cells) for node in network.nodes if node.cells]
        self.firsts = [sum(counts[:number]) for number in range(len(counts))]

    def longer(self, given: list[Any]) -> Iterator[tuple[str, list[Any]]]:
        """Yield inputs of other sizes, each with the beginning of the message for outputs that differ."""
        shapes = [given[n].shape for n in self.data]
        rows, steps = (min((s[axis] for s in shapes if len(s) > axis), default=1) for axis in (0, 1))
        tries = (
            (0, 1, "with one more row "),
            (1, 4, "with more steps "),
            (1, -1, "with one step fewer "),
            (0, 1 - rows, ONE_ROW),
            (1, 1 - steps, ONE_STEP),
            (0, MORE_ROWS, f"with {MORE_ROWS} more rows "),
            (1, LONGER, MUCH_LONGER),
        )
        for axis, more, what in tries:
            if (axis and self.steps) or not more:
                continue  # `answers` always computes several steps
            along = {n: self.axes[f"input_{n}"].find("BT"[axis]) for n in self.starts} | dict.fromkeys(self.data, axis)
            if all(given[n].ndim > axis and given[n].shape[axis] + more > 0 for n in self.data):
                yield (
                    what,
                    [value if along.get(n, -1) < 0 else _wider(value, along[n], more) for n, value in enumerate(given)],
                )

    def answers(self, module: Any, example: tuple[Any, ...], given: list[Any]) -> list[Any]:
        """Return the outputs of a module as a list; if a call is one step, those of several steps."""
        if not self.steps:
            return _tensors(module(*_fresh(_like(example, given))))
        import torch

        made: list[list[Any]] = []
        after = self._next_states()
        for t in range(STEPS):
            now = [value.roll(t, -1) if n in self.data else value for n, value in enumerate(given)]
            if made:
                now = [made[-1][after[n]] if n in after else value for n, value in enumerate(now)]
            made.append(_tensors(module(*_fresh(_like(example, now)))))
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

    def run(self, network: Network, given: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the outputs and the final states of a network, for the inputs of the module."""
        arrays = [_array(given[n]) for n in self.data]
        if self.steps:
            arrays = [np.stack([np.roll(array, t, -1) for t in range(STEPS)], 1) for array in arrays]
        states: list[Any] = [None] * len(network.cells)
        kept = [dict.fromkeys(cell.spec.state_sizes) for cell in network.cells]
        for n, refs in self.starts.items():
            for ref, part in zip(refs, parted(_array(given[n]), self.axes[f"input_{n}"]), strict=False):
                if ref is not None:
                    kept[self.firsts[ref[0]] + ref[1]][ref[2]] = part
        for n, (own, cell) in enumerate(zip(kept, network.cells, strict=True)):
            lacks = [name for name, part in own.items() if part is None]
            if lacks and len(lacks) < len(own):
                if cell.spec.learn_initial_state:
                    raise ValueError(f"a cell is given only a part of its state, but has a learned initial {lacks[0]}")
                own |= {name: np.zeros((len(arrays[0]), cell.spec.state_sizes[name]), network.dtype) for name in lacks}
            states[n] = tuple(own.values()) if len(lacks) < len(own) else None
        x = tuple(arrays) if len(arrays) > 1 else arrays[0]
        ours, after = network.run(x, states if self.starts else None)
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
        import torch

        same = functools.partial(_same, tolerance=tolerance, squeezed=squeezed)

        parts = [part for state in states for part in state]
        left = list(ours)
        for n, wanted in enumerate(expected):
            if wanted is None:
                continue
            if not isinstance(wanted, torch.Tensor):
                return _no_tensor(n, wanted)
            theirs = _array(wanted)
            name = f"output_{n}"
            axes = self.outputs.get(name, "")
            noted = self.axes[name] if name in self.states else axes
            if squeezed and theirs.ndim < len(noted) and (name in self.states or noted[:1] in ("1", "D")):
                return None  # which axis of the state is missing isn't known
            if axes[:1] in ("1", "D") and "T" not in axes:  # a last state, which is an output [B, H] of the network
                theirs = ordered(theirs, axes, theirs.shape[axes.index("B")])
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


def _no_tensor(n: int, value: Any) -> str:
    return f"output {n} of the module is a {type(value).__name__}, not a tensor"


def _wider(value: Any, axis: int, more: int) -> Any:
    """Return a tensor with a longer axis, filled by repeating it from the start."""
    size = value.shape[axis]
    return value[(slice(None),) * axis + ([n % size for n in range(size + more)],)]


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return copies of inputs, which a module may modify."""
    return _like(inputs, [value.detach().clone() for value in _tensors(inputs)])


def _like(structure: Any, values: Iterable[Any]) -> Any:
    """Return values in the nested tuples and lists of `structure`."""
    queue = iter(values)

    def put(part: Any) -> Any:
        if not isinstance(part, (tuple, list)):
            return next(queue)
        made = [put(one) for one in part]
        if hasattr(part, "_fields"):
            return type(part)(*made)
        return tuple(made) if isinstance(part, tuple) else made

    return put(structure)


def _array(value: Any) -> Any:
    """Return a tensor as a NumPy array; bfloat16 as float32."""
    import torch

    value = value.detach().cpu()
    return np.asarray(value.float() if value.dtype is torch.bfloat16 else value)


def _same(ours: Any, theirs: Any, tolerance: float, squeezed: bool = False) -> bool:
    if squeezed:
        ours, theirs = ours.squeeze(), theirs.squeeze()
    return ours.shape == theirs.shape and _off(ours, theirs) <= tolerance


def _off(ours: Any, theirs: Any) -> float:
    """Return the greatest difference of two arrays of the same shape, relative to the largest finite value of `theirs`.

    Where both are NaN, or the same infinity, they don't differ; where only one is, they differ infinitely.
    """
    with np.errstate(invalid="ignore"):
        apart = np.abs(ours - theirs)
    alike = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    apart = np.where(alike, 0, np.nan_to_num(apart, nan=np.inf, posinf=np.inf))
    return float(apart.max(initial=0.0) / max(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0), 1e-30))


def _tensors(value: Any) -> list[Any]:
    """Return the tensors in a module's output as a flat list."""
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list)) else [value]
