"""ONNX graphs that no Network can express: recurrent operators run on the kernel, all others in ONNX Runtime.

The graph is cut at its recurrent operators. The depth of an operator is the greatest number of recurrent operators on a
path to it, itself included; all other operators of one depth form a segment, a model that one session of ONNX Runtime
runs. The parts run in order of depth, a depth's recurrent operators before its segment. For example

    x → Conv → LSTM a → NonZero → LSTM b → MatMul → y
         └────────────────→ Add ─────────────┘

has the segments {Conv}, {NonZero, Add} and {MatMul}: Add needs Conv and a only, so it runs at depth 1. What depends on
no input is part of each segment that uses it, so that ONNX Runtime can compute it once, when it loads the segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from cellstack import native
from cellstack.cells.errors import FormatError, ShapeError
from cellstack.cells.plan import Plan
from cellstack.formats.files import replacing
from cellstack.formats.onnx.cells import QUANTISED_OPERATOR, Operator, is_recurrent, read_operator
from cellstack.formats.onnx.file import ODD, Scope, label, live_nodes, onnx_package, read
from cellstack.formats.onnx.messages import graphs_of
from cellstack.network.running import processors
from cellstack.nodes.base import Array

IR_VERSION = 8  # of segments whose operators don't need a later one
DRAWS = ("Random", "Multinomial", "Bernoulli")  # operators that draw numbers, without inputs too
TENSORS = {"float32": "tensor(float)", "float64": "tensor(double)", "object": "tensor(string)"}


class NodeArg(NamedTuple):
    """An input or output of a graph, as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str | None]


class Kernel(NamedTuple):
    """A recurrent operator that runs on the kernel.

    Args:
        name: its name.
        operator: its cells, and the names of its lengths and initial states.
        x: the name of X.
        outputs: the names of Y, Y_h and Y_c, "" where unused.
        dtype: of its weights, inputs and outputs.
        sizes: the widths of X and of the states.
    """

    name: str
    operator: Operator
    x: str
    outputs: list[str]
    dtype: np.dtype[Any]
    sizes: tuple[int, ...]

    @property
    def inputs(self) -> list[str]:
        """The names of its inputs that aren't constant."""
        lengths = [self.operator.lengths] if self.operator.lengths else []
        return [self.x, *lengths, *self.operator.started.values()]

    def __repr__(self) -> str:
        spec, ways = self.operator.cells[0].spec, len(self.operator.cells)
        text = f"{spec.of_kind.title} {spec.input_size} -> {spec.units}{' and back' if ways > 1 else ''}"
        return f"{self.name}: {text}: fused cpu kernel ({native.isa()})"

    def start(self, types: dict[str, NodeArg], session: Any) -> None:
        """Add the types of the outputs."""
        units, ways, first = self.operator.cells[0].spec.units, len(self.operator.cells), self.operator.batch_first
        kind = TENSORS[str(self.dtype)]
        state: list[Any] = [None, ways, units] if first else [ways, None, units]
        shapes = [[None, None, ways, units] if first else [None, ways, None, units], state, state]
        types.update({name: NodeArg(name, kind, shape) for name, shape in zip(self.outputs, shapes, strict=False)})

    def run(self, values: dict[str, Array], threads: int | None, options: Any) -> None:
        """Compute the outputs with at most so many threads, and add them to the values.

        Raises:
            ShapeError: an input of another shape.
            TypeError: an input of another dtype.
        """
        operator, cells, first = self.operator, self.operator.cells, self.operator.batch_first
        size, *widths = self.sizes
        x = self._checked(values[self.x], (None, None, size))
        x = x if first else x.swapaxes(0, 1)
        batch, steps, _ = x.shape
        used = None
        if operator.lengths:
            used = np.arange(steps) < self._checked(values[operator.lengths], (batch,), "iu")[:, None]
        started: dict[str, Array] = {}
        for key, name in operator.started.items():
            ends = (batch, len(cells)) if first else (len(cells), batch)
            state = self._checked(values[name], (*ends, widths[0]))
            started[key.removeprefix("initial_")] = state.swapaxes(0, 1) if first else state
        runs, ys, afters, wanted = [], [], [], any(self.outputs[1:])
        for way, cell in enumerate(cells):
            before = None  # the cell's own
            if started:
                own = cell.initial.items()
                each = (started[part][way] if part in started else np.tile(at, (batch, 1)) for part, at in own)
                before = tuple(map(native.plain, each))
            afters.append(tuple([np.empty((batch, width), self.dtype) for width in widths]) if wanted else None)
            y = np.empty((steps, batch, widths[0]), self.dtype) if self.outputs[0] else None
            ys.append(y)
            reverse = way == 1 or operator.direction == "reverse"
            sequences = native.sequences(x, used, reverse=reverse, time_major=True)
            runs.append((sequences, [native.Layer(cell.packed, before, afters[-1], y)]))
        native.forward_each(runs, threads or processors())
        if self.outputs[0]:
            y = ys[0][:, None] if len(ys) == 1 else np.stack(ys, 1)  # [T, D, B, H]
            if used is not None:  # ONNX returns zeros past the end of a row
                y *= used.T[:, None, :, None]
            values[self.outputs[0]] = native.plain(y.transpose(2, 0, 1, 3)) if first else y
        for part, name in enumerate(self.outputs[1:]):
            if name:
                values[name] = np.stack([after[part] for after in afters], 1 if first else 0)

    def _checked(self, array: Array, shape: tuple[int | None, ...], kinds: str = "") -> Array:
        """Return an input, after checking it: the kernel trusts its caller."""
        if array.dtype.kind not in kinds if kinds else array.dtype != self.dtype:
            raise TypeError(f"{self.name}: expected {'integers' if kinds else self.dtype}, got {array.dtype}")
        if len(array.shape) != len(shape) or any(b not in (None, a) for a, b in zip(array.shape, shape, strict=True)):
            raise ShapeError(f"{self.name}: expected {list(shape)}, got {array.shape}")
        return array


class Segment:
    """Operators that run in ONNX Runtime, as one model.

    Args:
        name: its name.
        nodes: the operators.
        model: the model; inputs that another part computes still lack their types.
        inputs, outputs: names of values.
    """

    def __init__(self, name: str, nodes: Sequence[Any], model: Any, inputs: list[str], outputs: list[str]) -> None:
        self.name, self.nodes, self.model, self.inputs, self.outputs = name, nodes, model, inputs, outputs
        self.session: Any = None

    def __repr__(self) -> str:
        counts = Counter(node.op_type for node in self.nodes)
        kinds = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in counts.items())
        return f"{self.name}: ONNX Runtime: {kinds}"

    def start(self, types: dict[str, NodeArg], session: Callable[[bytes], Any]) -> None:
        """Create the session, with the types of the inputs, and add the types of the outputs."""
        onnx = onnx_package()
        del self.model.graph.input[:]
        for name in self.inputs:
            kind, shape = types[name].type.removeprefix("tensor(")[:-1], types[name].shape
            element = getattr(onnx.TensorProto, kind.upper())
            self.model.graph.input.append(onnx.helper.make_tensor_value_info(name, element, shape or None))
        self.session = session(self.model.SerializeToString())
        for one in self.session.get_outputs():
            if not one.type.startswith("tensor("):
                raise FormatError(f"{self.name}: expected a tensor, found {one.name} of type {one.type}")
            types[one.name] = NodeArg(one.name, one.type, list(one.shape))

    def run(self, values: dict[str, Array], threads: int | None, options: Any) -> None:
        """Compute the outputs with ONNX Runtime's RunOptions, and add them to the values."""
        found = self.session.run(self.outputs, {name: values[name] for name in self.inputs}, options)
        values.update(zip(self.outputs, found, strict=True))


class SegmentedNetwork:
    """A graph whose recurrent operators run on the kernel, and all others in segments, by ONNX Runtime.

    It takes and returns what the file does, with its axes. Unlike a Network, it can't stream and can't be
    written as C: these need every operator.

    Attributes:
        reason: why the graph isn't a Network.
        parts: the segments and recurrent operators, in the order in which they run.
        inputs, outputs: the names of the graph's inputs and outputs.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        onnx, model = onnx_package(), read(path)
        self.path, self.reason = path, reason.removeprefix(f"{path}: ")
        self.proto: Any = onnx.load(path)
        scope = model.scope()
        self.inputs = tuple(scope.given)
        self.outputs = tuple(value.name for value in scope.graph.output)
        self.parts, self.refused = _parts(self.proto, scope)
        self._types = {value.name: _argument(value) for value in self.proto.graph.input if value.name in self.inputs}
        self._ready = False

    @property
    def kernels(self) -> list[Kernel]:
        """The recurrent operators that run on the kernel."""
        return [part for part in self.parts if isinstance(part, Kernel)]

    @property
    def segments(self) -> list[Segment]:
        """The segments."""
        return [part for part in self.parts if isinstance(part, Segment)]

    def prepare(self, options: Any = None, providers: Sequence[Any] | None = None) -> SegmentedNetwork:
        """Create the sessions of the segments.

        Args:
            options: ONNX Runtime's SessionOptions; None: no thread waits actively for its next call, since the kernel
                runs in between.
            providers: ONNX Runtime's providers; None: the CPU's.

        Raises:
            ModuleNotFoundError: onnxruntime isn't installed; the message names the first segment and its operators.
            Exception: whatever ONNX Runtime raises for an invalid graph.
        """
        try:
            ort = import_module("onnxruntime") if self.segments else None
        except ModuleNotFoundError as error:
            first = self.segments[0]
            raise ModuleNotFoundError(
                f"{self.path}: {first} needs onnxruntime: pip install 'cellstack[onnxruntime]'", name=error.name
            ) from None
        if options is None and ort is not None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def session(data: bytes) -> Any:
            assert ort is not None
            return ort.InferenceSession(data, options, providers=providers or ["CPUExecutionProvider"])

        for part in self.parts:
            part.start(self._types, session)
        self._ready = True
        return self

    def arguments(self, names: Sequence[str]) -> list[NodeArg]:
        """Return values of the graph as ONNX Runtime describes them: inputs; after `prepare`, outputs too."""
        return [self._types.get(name, NodeArg(name, "", [])) for name in names]

    def compute(self, given: Mapping[str, Any], threads: int | None = None, options: Any = None) -> list[Array]:
        """Return the outputs in order.

        Args:
            given: the inputs by name.
            threads: the number of threads of the kernel; None: chosen by the amount of work. Those of the segments are
                set in `prepare`.
            options: ONNX Runtime's RunOptions.

        Raises:
            ValueError: missing or unknown inputs.
        """
        if given.keys() != set(self.inputs):
            raise ValueError(
                f"{self.path}: expected the inputs {', '.join(self.inputs)}, got {', '.join(given) or 'none'}"
            )
        if not self._ready:
            self.prepare()
        values: dict[str, Array] = {name: np.asarray(value) for name, value in given.items()}
        for part in self.parts:
            part.run(values, threads, options)
        return [values[name] for name in self.outputs]

    def __call__(self, x: Any) -> Any:
        """Run the graph.

        Args:
            x: the input, or the inputs by name or in order, with the axes and dtypes of the file.

        Returns:
            The output; a tuple of them if there are several.

        Raises:
            ValueError: missing or unknown inputs.
            ModuleNotFoundError: onnxruntime isn't installed.
        """
        found = self.compute(self.by_name(x))
        return found[0] if len(found) == 1 else tuple(found)

    def by_name(self, x: Any) -> Mapping[str, Any]:
        """Return the inputs, given by name or in order, by name."""
        if isinstance(x, Mapping):
            return x
        return dict(zip(self.inputs, [x] if len(self.inputs) == 1 else x, strict=True))

    def plan(self) -> Plan:
        """Return what runs each part, in order, and why the graph isn't a Network."""
        lines = [f"not a Network: {self.reason}"] if self.reason else []
        return Plan(
            [*lines, *map(repr, self.parts), *(f"{name}: ONNX Runtime: {why}" for name, why in self.refused.items())]
        )

    def __repr__(self) -> str:
        ends = [", ".join(f"{one.name} {one.shape}" for one in self.arguments(n)) for n in (self.inputs, self.outputs)]
        return "\n".join([f"SegmentedNetwork: {' -> '.join(ends)}", *(f"  {line}" for line in self.plan())])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the graph as an ONNX file.

        Raises:
            ValueError: another suffix than .onnx.
        """
        if not fspath(path).lower().endswith(".onnx"):
            raise self._lacks(f"save: {path}: only a .onnx file can hold")
        with replacing(fspath(path)) as file:
            file.write(self.proto.SerializeToString())

    def stream(self, *_: Any, **__: Any) -> Any:
        """Refuse: a segment needs whole sequences."""
        raise self._lacks("stream: no step-by-step form of")

    def export_c(self, *_: Any, **__: Any) -> Any:
        """Refuse: segments aren't written as C."""
        raise self._lacks("export_c: no C code for")

    def _lacks(self, what: str) -> ValueError:
        return ValueError(f"{what} {self.segments[0]}; not a Network: {self.reason}")


def segmented(path: str, reason: str) -> SegmentedNetwork | None:
    """Return a file that no Network can express, in parts; None if it has no recurrent operator for the kernel.

    If onnxruntime is installed, the sessions are created.

    Raises:
        FormatError: not a valid ONNX file: ONNX Runtime can't run it either.
    """
    try:
        made = SegmentedNetwork(path, reason)
        if made.kernels and find_spec("onnxruntime") is not None:
            made.prepare()
    except Exception as error:  # ONNX's and ONNX Runtime's errors have no common base class
        raise FormatError(reason) from error
    return made if made.kernels else None


def undivided(reason: str) -> Plan:
    """Return the plan of a file that ONNX Runtime runs alone."""
    return Plan([f"ONNX Runtime: {reason}"])


def _argument(value: Any) -> NodeArg:
    """Return an input of a graph."""
    kind = value.type.tensor_type
    element = str(onnx_package().helper.tensor_dtype_to_np_dtype(kind.elem_type))
    axes = [axis.dim_param or (axis.dim_value if axis.HasField("dim_value") else None) for axis in kind.shape.dim]
    return NodeArg(value.name, TENSORS.get(element, f"tensor({element})"), axes)


def _parts(proto: Any, scope: Scope) -> tuple[list[Kernel | Segment], dict[str, str]]:
    """Return the parts of a graph in order, and the recurrent operators that stay in segments with the reasons."""
    live = live_nodes(scope)
    nodes = [node for node in scope.graph.node if id(node) in live]
    ends = {value.name for value in scope.graph.output}
    needs = {id(node): set(_needs(node)) for node in nodes}
    used = ends.union(*needs.values())
    kernels: dict[int, Kernel] = {}
    refused: dict[str, str] = {}
    depths = dict.fromkeys(scope.given, 0)  # of values that depend on inputs
    groups: dict[int, list[Any]] = {}
    fixed: list[Any] = []
    for node in nodes:
        known = [depths[name] for name in needs[id(node)] if name in depths]
        if not known and not ends.intersection(node.output) and not node.op_type.startswith(DRAWS):
            fixed.append(node)
            continue
        if is_recurrent(node):
            try:
                kernels[id(node)] = made = _kernel(scope, node, used)
                needs[id(node)] = set(made.inputs)
            except ODD as error:
                refused[label(node)] = str(error).removeprefix(f"{scope.model.path}: ")
        depth = max(known, default=0) + (id(node) in kernels)
        groups.setdefault(depth, []).append(node)
        depths.update((name, depth) for name in node.output if name)
    helper = onnx_package().helper
    tensors = {tensor.name: tensor for graph in (scope.graph, proto.graph) for tensor in graph.initializer}
    settings = {"opset_imports": scope.model.imports, "ir_version": max(proto.ir_version, IR_VERSION)}
    parts: list[Kernel | Segment] = []
    for depth in sorted(groups):
        parts += [kernels[id(node)] for node in groups[depth] if id(node) in kernels]
        own = [node for node in groups[depth] if id(node) not in kernels]
        if not own:
            continue
        wanted = set[str]().union(*(needs[id(node)] for node in own))
        before: list[Any] = []
        for node in reversed(fixed):
            if wanted.intersection(node.output):
                before.insert(0, node)
                wanted |= needs[id(node)]
        within = {id(node) for node in own}
        outside = ends.union(*(names for node, names in needs.items() if node not in within))
        made = {name for node in own for name in node.output}
        inputs = [name for name in depths if name in wanted - made]
        outputs = [name for name in depths if name in made & outside]
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]  # ONNX Runtime infers their types
        name = f"segment {len(parts)}"
        graph = helper.make_graph([*before, *own], name, [], values, [tensors[n] for n in tensors if n in wanted])
        parts.append(Segment(name, own, helper.make_model(graph, **settings), inputs, outputs))
    return parts, refused


def _needs(node: Any) -> Iterator[str]:
    """Yield the names that a node takes, those of graphs inside it included."""
    yield from filter(None, node.input)
    for graph in graphs_of(node):
        for inner in graph.node:
            yield from _needs(inner)
        yield from (value.name for value in graph.output)


def _kernel(scope: Scope, node: Any, used: set[str]) -> Kernel:
    """Return a recurrent operator on the kernel.

    Raises:
        FormatError: an operator that isn't supported, or that rounds to another dtype than float32 or float64.
    """
    if node.op_type == QUANTISED_OPERATOR:
        raise FormatError("the kernel doesn't round x and h to 8 bits")
    operator, weights = read_operator(scope, node), scope.constant(node.input[1])
    cell = operator.cells[0]
    if not isinstance(weights, np.ndarray) or weights.dtype != cell.dtype:
        raise FormatError(f"its weights are {getattr(weights, 'dtype', 'unknown')}, not float32 or float64")
    outputs = [name if name in used else "" for name in node.output]
    sizes = (cell.spec.input_size, *cell.spec.state_sizes.values())
    return Kernel(label(node), operator, node.input[0], outputs, cell.dtype, sizes)
