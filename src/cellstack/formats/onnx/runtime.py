"""ONNX graphs that no Network can express: a session of ONNX Runtime, in which recurrent operators run on the kernel.

LSTM, GRU and RNN with constant weights and Scans that are cells, also inside If, Loop and Scan, are replaced by
operators of the kernel, which is a library of custom operators for ONNX Runtime: see kernel/onnxruntime.cpp. ONNX
Runtime runs the graph.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np

from cellstack import native
from cellstack.cells.errors import FormatError
from cellstack.cells.plan import Plan
from cellstack.cells.spec import CellSpec
from cellstack.formats.files import replacing
from cellstack.formats.onnx.cells import QUANTISED_OPERATOR, Operator, is_recurrent, read_operator
from cellstack.formats.onnx.decomposed.scans import is_scan, read_scan
from cellstack.formats.onnx.file import ODD, Scope, label, onnx_package, parsed
from cellstack.formats.onnx.messages import graphs_of
from cellstack.formats.onnx.outputs import described
from cellstack.network.running import processors
from cellstack.nodes.base import Array

DOMAIN = "cellstack"
SPINNING = "session.intra_op.allow_spinning"  # whether its threads wait actively, and compete with the kernel's
FOLDER = "session.model_external_initializers_file_folder_path"  # ONNX Runtime's option: where external tensors are

_registered: WeakSet[Any] = WeakSet()  # SessionOptions that have the kernel's operators: they take them only once


class Kernel(NamedTuple):
    """A recurrent operator that runs on the kernel.

    Args:
        name: its name.
        spec: its cell, of both directions.
        ways: the number of directions.
    """

    name: str
    spec: CellSpec
    ways: int

    def __repr__(self) -> str:
        text = f"{self.spec.of_kind.title} {self.spec.input_size} -> {self.spec.units}"
        return f"{self.name}: {text}{' and back' if self.ways > 1 else ''}: fused cpu kernel ({native.isa()})"


class Replacement:
    """An ONNX file, in which the kernel's operators take the place of recurrent ones.

    Attributes:
        kernels: the operators that are replaced.
        refused: why others aren't, by name.
        loops: the number of Scans that aren't replaced.
        others: all other operators, in words.
        inputs, outputs: the names of the graph's inputs and outputs.

    Args:
        path: the path of the file.
        data: its content.

    Raises:
        FormatError: not an ONNX file, or of an unsupported version.
    """

    def __init__(self, path: str, data: bytes) -> None:
        self._model, self._proto = parsed(path, data)
        scope = self._model.scope()
        # Inputs with a default value; in earlier versions of the format, a call can't replace it.
        defaults = scope.initializers.keys() & set(scope.inputs) if self._proto.ir_version >= 4 else set()
        self._fixed = defaults & _weights(scope.graph)
        scope.known |= dict.fromkeys(defaults - self._fixed)
        self.inputs = tuple(scope.given)
        self.outputs = tuple(value.name for value in scope.graph.output)
        self._found: list[tuple[Any, Operator]] = []
        self.refused: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for node, operator in _operators(scope):
            if isinstance(operator, Operator):
                self._found.append((node, operator))
                continue
            if operator:
                self.refused[label(node)] = operator.removeprefix(f"{path}: ")
            counts[node.op_type] += 1
        self.kernels = [Kernel(label(node), it.cells[0].spec, len(it.cells)) for node, it in self._found]
        self.loops = counts["Scan"]
        self.others = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in counts.items())

    @property
    def plan(self) -> Plan:
        """What runs each operator."""
        rest = [f"other operators: ONNX Runtime: {self.others}"] if self.others else []
        refused = [f"{name}: ONNX Runtime: {why}" for name, why in self.refused.items()]
        return Plan([*map(repr, self.kernels), *rest, *refused])

    def session(self, make: Any, options: Any) -> tuple[Any, list[Any]]:
        """Return `make(model, options)` of the changed model, and its operators.

        These must exist while sessions of this model are created, as by `set_providers`.

        Args:
            make: creates a session.
            options: ONNX Runtime's SessionOptions, which get the kernel's operators.
        """
        threads, graph = options.intra_op_num_threads or processors(), self._proto.graph
        operators = [_replace(node, operator, threads) for node, operator in self._found]
        versions = {entry.domain: entry.version for entry in self._proto.opset_import} | {DOMAIN: 1}
        if self._proto.functions:  # the parsed graph has the functions' operators in place of calls
            for function in self._proto.functions:
                versions = {entry.domain: entry.version for entry in function.opset_import} | versions
            del graph.node[:], self._proto.functions[:]
            graph.node.extend(self._model.graph.node)
        _remove_unused(graph)
        for place, value in reversed(list(enumerate(graph.input))):
            if value.name in self._fixed:
                del graph.input[place]
        del self._proto.opset_import[:]
        for domain, version in versions.items():
            self._proto.opset_import.add(domain=domain, version=version)
        if any(tensor.data_location for one in _graphs(graph) for tensor in one.initializer):
            options.add_session_config_entry(FOLDER, os.path.dirname(os.path.abspath(self._model.path)))
        if options not in _registered:
            options.register_custom_ops_library(native.LIBRARY)
            _registered.add(options)
            if not entry_of(options, SPINNING):
                options.add_session_config_entry(SPINNING, "0")
        data = self._proto.SerializeToString()
        del self._model, self._proto, self._found, graph
        return make(data, options), operators


class RuntimeModel:
    """A graph that ONNX Runtime runs, with its recurrent operators on the kernel.

    It takes and returns what the file does, with its axes. Unlike a Network, it can't stream and can't be
    written as C: these need every operator.

    Args:
        path: an ONNX file.
        reason: why it isn't a Network.

    Attributes:
        kernels: the operators that run on the kernel.
        loops: the number of Scans that aren't cells, which ONNX Runtime runs.
        refused: why other recurrent operators don't, by name.
        inputs, outputs: the names of the graph's inputs and outputs.
        session: ONNX Runtime's session; None before `prepare`.

    Raises:
        FormatError: not an ONNX file, or of an unsupported version.
        OSError: the file can't be read.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        self.path, self.reason = path, reason.removeprefix(f"{path}: ")
        with open(path, "rb") as file:
            self._data = file.read()
        self._made: Replacement | None = Replacement(path, self._data)
        self.kernels, self.refused, self._plan = self._made.kernels, self._made.refused, self._made.plan
        self.loops = self._made.loops
        self.inputs, self.outputs, self._others = self._made.inputs, self._made.outputs, self._made.others
        self.session: Any = None

    def prepare(self, options: Any = None, providers: Sequence[Any] | None = None) -> RuntimeModel:
        """Create the session.

        Args:
            options: ONNX Runtime's SessionOptions; None: the defaults, without warnings.
            providers: ONNX Runtime's providers, for all other operators; None: the CPU's.

        Raises:
            ModuleNotFoundError: onnxruntime isn't installed; the message names the operators that need it.
            Exception: whatever ONNX Runtime raises for an invalid graph.
        """
        try:
            ort = import_module("onnxruntime")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.path}: its operators {self._others} need onnxruntime: pip install 'cellstack[onnxruntime]'",
                name=error.name,
            ) from None
        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
        chosen = providers or ["CPUExecutionProvider"]
        made, self._made = self._made or Replacement(self.path, self._data), None
        self.session, self._operators = made.session(
            lambda data, o: ort.InferenceSession(data, o, providers=chosen), options
        )
        return self

    def arguments(self, names: Sequence[str]) -> list[Any]:
        """Return inputs and outputs as ONNX Runtime describes them, each with `name`, `type` and `shape`."""
        session = self._started()
        outputs = described(session.get_outputs(), self._operators)
        every = {one.name: one for one in (*session.get_inputs(), *outputs)}
        return [every[name] for name in names]

    def compute(self, given: Mapping[str, Any], options: Any = None) -> list[Array]:
        """Return the outputs in order.

        Args:
            given: the inputs by name.
            options: ONNX Runtime's RunOptions.

        Raises:
            ValueError: missing or unknown inputs.
            Exception: whatever ONNX Runtime raises. Of a recurrent operator whose inputs don't fit, the message has its
                name, and what it expected and found.
        """
        if given.keys() != set(self.inputs):
            raise ValueError(
                f"{self.path}: expected the inputs {', '.join(self.inputs)}, got {', '.join(given) or 'none'}"
            )
        return self._started().run(None, {name: np.asarray(value) for name, value in given.items()}, options)

    def _started(self) -> Any:
        return self.session or self.prepare().session

    def __call__(self, x: Any) -> Any:
        """Run the graph.

        Args:
            x: the input, or the inputs by name or in order, with the axes and dtypes of the file.

        Returns:
            The output; a tuple of them if there are several.

        Raises:
            ValueError, Exception: see `compute`.
            ModuleNotFoundError: onnxruntime isn't installed.
        """
        found = self.compute(self.by_name(x))
        return found[0] if len(found) == 1 else tuple(found)

    def by_name(self, x: Any) -> Mapping[str, Any]:
        """Return the inputs, given by name or in order, by name.

        Raises:
            ValueError: another number of them.
        """
        if isinstance(x, Mapping):
            return x
        values = [x] if len(self.inputs) == 1 else x if isinstance(x, (tuple, list)) else []
        if len(values) != len(self.inputs):
            got = f"{len(values)} in order" if values else type(x).__name__
            raise ValueError(
                f"{self.path}: expected the inputs {', '.join(self.inputs)}, by name or in order, got {got}"
            )
        return dict(zip(self.inputs, values, strict=True))

    def plan(self) -> Plan:
        """Return what runs each operator, and why the graph isn't a Network."""
        return Plan([*([f"not a Network: {self.reason}"] if self.reason else []), *self._plan])

    def __repr__(self) -> str:
        shapes = (
            {one.name: f" {one.shape}" for one in self.arguments((*self.inputs, *self.outputs))} if self.session else {}
        )
        ends = [", ".join(f"{name}{shapes.get(name, '')}" for name in names) for names in (self.inputs, self.outputs)]
        return "\n".join([f"RuntimeModel: {' -> '.join(ends)}", *(f"  {line}" for line in self.plan())])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the graph as an ONNX file.

        Raises:
            ValueError: another suffix than .onnx.
        """
        if not fspath(path).lower().endswith(".onnx"):
            raise self._lacks(f"save: {path}: only a .onnx file can hold")
        onnx = onnx_package()
        proto = onnx.ModelProto.FromString(self._data)
        onnx.load_external_data_for_model(proto, os.path.dirname(self.path))
        with replacing(fspath(path)) as file:
            file.write(proto.SerializeToString())

    def stream(self, *_: Any, **__: Any) -> Any:
        """Refuse: ONNX Runtime's operators need whole sequences."""
        raise self._lacks("stream: no step-by-step form of")

    def export_c(self, *_: Any, **__: Any) -> Any:
        """Refuse: ONNX Runtime's operators aren't written as C."""
        raise self._lacks("export_c: no C code for")

    def _lacks(self, what: str) -> ValueError:
        return ValueError(f"{what} ONNX Runtime's operators, {self._others}; not a Network: {self.reason}")


def entry_of(options: Any, key: str) -> str:
    """Return an entry of ONNX Runtime's SessionOptions; "" if it isn't set."""
    try:
        return options.get_session_config_entry(key)
    except RuntimeError:
        return ""


def runtime_model(path: str, reason: str) -> RuntimeModel | None:
    """Return a file that no Network can express; None if it has neither a recurrent operator for the kernel nor a loop.

    If onnxruntime is installed, the session is created.

    Raises:
        FormatError: not a valid ONNX file: ONNX Runtime can't run it either.
    """
    try:
        made = RuntimeModel(path, reason)
        used = bool(made.kernels or made.loops)
        if used and find_spec("onnxruntime") is not None:
            made.prepare()
    except Exception as error:  # ONNX's and ONNX Runtime's errors have no common base class
        raise FormatError(reason) from error
    return made if used else None


def _operators(scope: Scope) -> Iterator[tuple[Any, Operator | str]]:
    """Yield the nodes of a graph and of the graphs inside it, each with its operator for the kernel.

    The operator of others is text: why a recurrent operator stays in ONNX Runtime, or nothing. The nodes inside a Scan
    that is a cell are left out.
    """
    whole: set[int] = set()  # ids of the Scans that are cells
    for node, inner in scope.inner():
        if inner is None:
            operator = _operator(scope, node)
            whole |= {id(node)} if isinstance(operator, Operator) else set()
            yield node, operator
        elif id(node) not in whole:
            yield from _operators(inner)


def _operator(scope: Scope, node: Any) -> Operator | str:
    """Return a node's operator for the kernel, or why a recurrent operator isn't one."""
    if node.op_type == QUANTISED_OPERATOR:
        return "the kernel doesn't round x and h to 8 bits"
    if is_scan(node):
        with suppress(*ODD):  # a Scan that isn't a cell
            operator = read_scan(scope, node)
            named = onnx_package().helper.np_dtype_to_tensor_dtype(operator.cells[0].dtype)
            body = next(entry.g for entry in node.attribute if entry.name == "body")
            return operator if {value.type.tensor_type.elem_type for value in body.input} <= {0, named} else ""
    if not is_recurrent(node):
        return ""
    try:
        operator, weights = read_operator(scope, node), scope.constant(node.input[1])
    except ODD as error:
        return str(error)
    if not isinstance(weights, np.ndarray) or weights.dtype != operator.cells[0].dtype:
        return f"its weights are {getattr(weights, 'dtype', 'unknown')}, not float32 or float64"
    return operator


def _replace(node: Any, operator: Operator, threads: int) -> Any:
    """Make a node the kernel's operator, and return that."""
    cells, first = operator.cells, operator.cells[0]
    names = [operator.started.get(f"initial_{part}", "") for part in first.spec.state_sizes]
    scan = is_scan(node)
    made = native.recurrent(
        [(cell.spec, cell.arrays) for cell in cells],
        reverse=operator.direction == "reverse",
        batch_first=operator.batch_first,
        directions=not scan,
        lengths=bool(operator.lengths),
        started=[bool(name) for name in names],
        threads=threads,
    )
    node.domain, node.op_type = DOMAIN, "Recurrent" if first.dtype == np.float32 else "RecurrentDouble"
    node.input[:] = [node.input[-1 if scan else 0], *filter(None, (operator.lengths, *names))]
    if scan:
        node.output[:] = [node.output[-1], *node.output[:-1]]
    node.output.extend([""] * (1 + len(names) - len(node.output)))  # the kernel sets the shape of each
    del node.attribute[:]
    node.attribute.append(onnx_package().helper.make_attribute("handle", made.handle))
    return made


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a GraphProto, and those inside it."""
    yield graph
    for node in graph.node:
        for inner in graphs_of(node):
            yield from _graphs(inner)


def _weights(graph: Any) -> set[str]:
    """Return the names of values on which the weights of recurrent operators depend."""
    found: set[str] = set()
    for one in reversed(list(_graphs(graph))):
        for node in reversed(one.node):
            if is_recurrent(node):
                found.update((*node.input[1:4], *node.input[7:]))
            elif not found.isdisjoint(node.output):
                found.update(node.input)
    return found


def _remove_unused(graph: Any) -> set[str]:
    """Remove what doesn't lead to an output from a GraphProto and those inside it; return the names that are used.

    ONNX Runtime would warn about unused tensors.
    """
    used = {value.name for value in graph.output}
    for place, node in reversed(list(enumerate(graph.node))):
        if used.isdisjoint(node.output):
            del graph.node[place]
            continue
        used.update(node.input)
        for inner in graphs_of(node):
            used |= _remove_unused(inner)
    constants = {tensor.name for tensor in graph.initializer}
    for entries in (graph.initializer, graph.input):
        for place, one in reversed(list(enumerate(entries))):
            if one.name not in used and one.name in constants:
                del entries[place]
    return used
