"""ONNX's recurrent operators as cells.

Ref: ONNX, Operators.md, LSTM, GRU and RNN; DynamicQuantizeLSTM: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cellstack.cells import KINDS, Kind, orders
from cellstack.cells.activations import PARAMETERS as USUAL_PARAMETERS
from cellstack.cells.activations import activation
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array, from_rows, reorder
from cellstack.cells.spec import CellSpec
from cellstack.formats.build import clean, errors_of
from cellstack.formats.onnx.file import DOMAINS, Constant, Scope, label, short
from cellstack.formats.onnx.fold import numbers
from cellstack.network import Network
from cellstack.nodes import Node, Select
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent

ORDER = orders("onnx")  # of the gate blocks; ONNX calls g c or h
OPERATORS_OF = {kind.name: kind.names["onnx"].name for kind in KINDS.values() if "onnx" in kind.names}
QUANTISED_OPERATOR = "DynamicQuantizeLSTM"
KIND_OF = {operator: kind for kind, operator in OPERATORS_OF.items()}
KIND_OF[QUANTISED_OPERATOR] = KIND_OF["LSTM"]
MICROSOFT = "com.microsoft"
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
QUANTISED = (*INPUTS, "W_scale", "W_zero_point", "R_scale", "R_zero_point")
DIRECTIONS = ("forward", "reverse", "bidirectional")
NAMES = {
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Relu": "relu",
    "HardSigmoid": "hard_sigmoid",
    "Softsign": "softsign",
    "Softplus": "softplus",
    "Elu": "elu",
    "Affine": "affine",
    "LeakyRelu": "leaky_relu",
    "ThresholdedRelu": "thresholded_relu",
    "ScaledTanh": "scaled_tanh",
}
ONNX_NAMES = {ours: theirs for theirs, ours in NAMES.items()} | {"linear": "Affine"}
OPERATORS = {  # standalone activation operators
    "Exp": "exponential",
    "LogSoftmax": "log_softmax",
    "Selu": "selu",
    "Softmax": "softmax",
    "Swish": "silu",
}
PARAMETERS = {  # alpha and beta of a standalone operator; None: no such operator
    "HardSigmoid": (0.2, 0.5),
    "Elu": (1.0,),
    "Affine": (None, None),
    "LeakyRelu": (0.01,),
    "ThresholdedRelu": (1.0,),
    "ScaledTanh": (None, None),
}
GIVEN = ("Affine", "ScaledTanh", "ThresholdedRelu")  # in cells, ONNX and ONNX Runtime have different defaults
FLAGS = {"coupled": "input_forget", "reset_after": "linear_before_reset"}
ATTRIBUTES = {
    "activation_alpha",
    "activation_beta",
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
    "layout",
    "linear_before_reset",
}


class Operator(NamedTuple):
    """A recurrent operator: its cells, one per direction, its order of axes and its states."""

    cells: tuple[Cell, ...]
    direction: str
    batch_first: bool  # layout 1: [B, T, …] in and out; 0: [T, B, …]
    lengths: str  # name of the value with the rows' lengths; "" where all steps count
    started: dict[str, str]  # names of the values of initial_h and initial_c that aren't constant


def is_recurrent(node: Any) -> bool:
    """Whether a node is one of the recurrent operators."""
    if node.op_type == QUANTISED_OPERATOR:
        return node.domain == MICROSOFT
    return node.domain in DOMAINS and node.op_type in KIND_OF


def operator_of(spec: CellSpec) -> str:
    """Return the operator for a rolled-up loop; for kinds that ONNX lacks, one that is read like any other."""
    return OPERATORS_OF.get(spec.kind, "LSTM")


def gates_of(kind: Kind) -> list[str]:
    """Return the gates with ONNX's activation f, which all of them share; the others are candidates."""
    return [gate for gate, role in kind.gates.items() if role != "candidate"]


def slots_of(kind: Kind) -> dict[str, str]:
    """Return where ONNX's activations f, g and h apply, those that the kind has, and their defaults."""
    candidates = [slot for slot in kind.slots if slot not in gates_of(kind)]
    return dict.fromkeys(gates_of(kind)[:1], "Sigmoid") | dict.fromkeys(candidates, "Tanh")


def nodes_of(operator: Operator, sequences: bool, zeros: bool) -> list[Node]:
    """Return the nodes that run an operator: one, and a second that reverses the steps where it runs backward.

    Args:
        operator: from `read_operator`.
        sequences: whether to return every step's output, or only the last.
        zeros: whether steps past a row's length yield zeros.
    """
    if operator.direction == "bidirectional":
        ahead, back = operator.cells
        forward = Recurrent((ahead,), return_sequences=sequences)
        return [Bidirectional(forward, Recurrent((back,), return_sequences=sequences, go_backwards=True))]
    reverse = operator.direction == "reverse"
    node = Recurrent(operator.cells, sequences, reverse, zero_output_for_mask=zeros)
    return [node, Select(step=-1)] if reverse and sequences else [node]


def network_of(operator: Operator, name: str, source: dict[str, Any]) -> Network:
    """Return an operator as a separate Network, `[B, T, I]` to `[B, T, W]`."""
    nodes = nodes_of(operator, sequences=True, zeros=bool(operator.lengths))
    inner = clean(name)
    return Network(nodes, [inner, f"{inner}.in_order"][: len(nodes)], {"source": {**source, "node": name}})


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_operator(scope: Scope, node: Any) -> Operator:
    """Return a recurrent operator of a graph as cells.

    Raises:
        FormatError: weights that aren't constant or have the wrong shape, an unknown setting.
    """
    model = scope.model
    if node.output and node.output[0] in model.rolled:
        return model.rolled[node.output[0]]
    where = f"{model.path}: node {short(scope.place + '/' + label(node) if scope.place else label(node))}"
    names = QUANTISED if node.op_type == QUANTISED_OPERATOR else INPUTS
    inputs = {key: name for key, name in zip(names, node.input, strict=False) if name}
    if len(node.input) > len(names):
        raise FormatError(f"{where}: expected at most {len(names)} inputs, found {len(node.input)}")
    attributes = model.attributes(node)
    kind = KINDS[KIND_OF[node.op_type]]
    direction = attributes.get("direction", "forward")
    settings = _settings(where, kind, attributes, direction)
    constants = {key: scope.constant(name) for key, name in inputs.items() if key not in ("X", "sequence_lens")}
    for key in ("W", "R", "B", "P", *names[8:]):
        if (key in inputs or key in ("W", "R")) and not isinstance(constants.get(key), np.ndarray):
            origin = _origin(scope, inputs[key]) if key in inputs else "none"
            raise FormatError(f"{where}: expected {key} to be constant, found {origin}")
    arrays = {key: value for key, value in constants.items() if isinstance(value, np.ndarray)}
    if names is QUANTISED:
        _dequantise(where, arrays)
    states = {key: constants[key] for key in ("initial_h", "initial_c") if key in inputs}
    batch_first = bool(attributes.get("layout", 0))
    cells = _cells(where, kind, arrays, settings, attributes.get("hidden_size"), states, batch_first)
    started = {key: inputs[key] for key, value in states.items() if value is None}
    return Operator(cells, direction, batch_first, inputs.get("sequence_lens", ""), started)


def _origin(scope: Scope, name: str) -> str:
    """Return the origin of a value that isn't constant: its earliest operator, or an input."""
    text, seen = f"{short(name)}", set()
    while name not in seen:
        seen.add(name)
        node = scope.producers.get(name)
        if node is None:
            return f"{text}, from the input {short(name)}" if name in scope.inputs else text
        text = f"{text}, computed by {node.op_type} {short(label(node))}" if len(seen) == 1 else text
        name = next((n for n in node.input if n and scope.constant(n) is None), "")
        if not name:
            return f"{text}, but {node.op_type} {short(label(node))} can't be evaluated"
    return text


def _settings(where: str, kind: Kind, attributes: dict[str, Any], direction: str) -> list[dict[str, Any]]:
    """Return the cell flags of each direction, from the attributes."""
    unknown = sorted(attributes.keys() - ATTRIBUTES - {"output_sequence"})
    if unknown:
        raise FormatError(f"{where}: unknown attribute {short(unknown[0])}")
    if direction not in DIRECTIONS:
        raise FormatError(f"{where}: expected direction to be one of {', '.join(DIRECTIONS)}, found {short(direction)}")
    slots, count = slots_of(kind), 2 if direction == "bidirectional" else 1
    each = len(slots)
    names = attributes.get("activations") or [*slots.values()] * count
    if len(names) != each * count:
        raise FormatError(f"{where}: expected {each * count} activations, found {short(names)}")
    texts = _activations(where, names, attributes)
    flags: dict[str, Any] = {"kind": kind.name}
    flags |= {ours: bool(attributes.get(theirs, 0)) for ours, theirs in FLAGS.items() if ours in kind.settings}
    if "clip" in attributes:
        flags["clip"] = decimal(attributes["clip"])
    shared = gates_of(kind)
    settings = []
    for d in range(count):
        by_slot = dict(zip(slots, texts[d * each : (d + 1) * each], strict=True))
        usual = {"recurrent_activation": by_slot.pop(shared[0])} if shared else {}
        settings.append({**flags, **usual, "activation": next(iter(by_slot.values())), "gate_activations": by_slot})
    return settings


def _activations(where: str, names: list[str], attributes: dict[str, Any]) -> list[str]:
    """Return activations in cellstack's notation; alpha and beta are assigned, in order, to those that use them."""
    values = [list(attributes.get(key, ())) for key in ("activation_alpha", "activation_beta")]
    texts = []
    for name in names:
        if name not in NAMES:
            raise FormatError(f"{where}: expected activations of {', '.join(NAMES)}, found {short(name)}")
        parameters = []
        for left, usual in zip(values, PARAMETERS.get(name, ()), strict=False):
            if not left and name in GIVEN:
                raise FormatError(f"{where}: {name} needs alpha and beta")
            parameters.append(decimal(left.pop(0) if left else usual))
        text = NAMES[name] + (f"({', '.join(map(repr, parameters))})" if parameters else "")
        text = "linear" if text == "affine(1.0, 0.0)" else text
        try:
            activation(text)
        except ValueError as error:
            raise FormatError(f"{where}: {error}") from None
        texts.append(text)
    return texts


def activation_text(node: Any, attributes: dict[str, Any]) -> str | None:
    """Return the activation of a graph's operator in cellstack's notation; None where it isn't one.

    Affine and ScaledTanh exist in recurrent operators only.
    """
    usual = PARAMETERS.get(node.op_type, ())
    if node.op_type not in NAMES or None in usual:
        return None
    values = [attributes.get(key, value) for key, value in zip(("alpha", "beta"), usual, strict=False)]
    parameters = ", ".join(repr(decimal(value)) for value in values)
    return NAMES[node.op_type] + (f"({parameters})" if values else "")


def decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 0.2, not 0.20000000298; 1/6 stays 1/6."""
    sixth = USUAL_PARAMETERS["hard_sigmoid"][0]
    return sixth if np.float32(value) == np.float32(sixth) else float(str(np.float32(value)))


def _dequantise(where: str, arrays: dict[str, Array]) -> None:
    """Replace the integers of W and R, transposed as `[D, I, 4H]`, by floats."""
    for key in ("W", "R"):
        scale, zero = arrays.get(f"{key}_scale"), arrays.get(f"{key}_zero_point")
        if scale is None or zero is None:
            raise FormatError(f"{where}: {key}_scale and {key}_zero_point are missing")
        weights = arrays[key]
        fits = weights.ndim == 3 and weights.dtype.kind in "iu" and scale.shape == zero.shape
        if not fits or scale.shape not in (weights.shape[:1], (weights.shape[0], weights.shape[2])):
            raise FormatError(
                f"{where}: expected {key} [D, I, 4H] of 8-bit integers and scales [D] or [D, 4H], "
                f"found {weights.dtype} {weights.shape} and {scale.shape}"
            )
        wide = [value.reshape(len(weights), 1, -1).astype(np.float32) for value in (zero, scale)]
        arrays[key] = ((weights.astype(np.float32) - wide[0]) * wide[1]).transpose(0, 2, 1)


def _cells(
    where: str,
    kind: Kind,
    arrays: dict[str, Array],
    settings: list[dict[str, Any]],
    hidden: int | None,
    states: dict[str, Constant | None],
    batch_first: bool,
) -> tuple[Cell, ...]:
    """Return the cell of each direction."""
    ways, gates = len(settings), len(kind.gates)
    weights, recurrent = arrays["W"], arrays["R"]
    units = recurrent.shape[-1] if recurrent.ndim == 3 else 0
    if hidden is not None and hidden != units:
        raise FormatError(f"{where}: expected R [{ways}, {gates}·H, H] with H={short(hidden)}, found {recurrent.shape}")
    wide = gates * units
    shapes = {"W": (ways, wide, weights.shape[-1] if weights.ndim == 3 else 0), "R": (ways, wide, units)}
    shapes |= {"B": (ways, 2 * wide), "P": (ways, (gates - 1) * units)}
    dtype = np.dtype(np.float64 if weights.dtype == np.float64 else np.float32)
    for key, shape in shapes.items():
        if key in arrays and (arrays[key].shape != shape or 0 in shape):
            raise FormatError(f"{where}: expected {key} of shape {list(shape)}, found {list(arrays[key].shape)}")
        if key in arrays and arrays[key].dtype.kind != "f":
            raise FormatError(f"{where}: expected {key} as floats, found {arrays[key].dtype}")
    arrays = {key: value.astype(dtype) for key, value in arrays.items() if key in shapes}
    starts = _starts(where, kind, states, ways, units, batch_first)
    cells = []
    for d, flags in enumerate(settings):
        flags = {**flags, "use_bias": "B" in arrays, "peepholes": "P" in arrays and "peepholes" in kind.settings}
        with errors_of(where):
            spec = CellSpec(weights.shape[2], units, **flags, learn_initial_state=bool(starts))
        biases = tuple(np.split(arrays["B"][d], 2)) if "B" in arrays else ()
        rows = from_rows(kind.name, arrays["W"][d], arrays["R"][d], biases, ORDER[kind.name], spec.reset_after)
        by_name: dict[str, Any] = rows._asdict()
        if spec.peepholes:
            by_name["peepholes"] = reorder(arrays["P"][d], *orders_of_peepholes(kind))
        for name, gates_of_array in gates_of_arrays(kind).items():  # of a coupled f, they exist, but aren't used
            if by_name.get(name) is not None:
                used = [n for n, gate in enumerate(gates_of_array) if gate in spec.gates]
                by_name[name] = blocks_of(by_name[name], units)[..., used, :].reshape(*by_name[name].shape[:-1], -1)
        if spec.peepholes:
            by_name["peepholes"] = by_name["peepholes"].reshape(-1, units)
        first = {f"initial_{key}": rows[d].astype(dtype) for key, rows in starts.items() if key in spec.state_sizes}
        cells.append(Cell(spec, **by_name, **first))
    return tuple(cells)


def gates_of_arrays(kind: Kind) -> dict[str, list[str]]:
    """Return the gates that have columns in each array."""
    return {
        **{name: [*kind.gates] for name in ("kernel", "recurrent_kernel", "bias")},
        "peepholes": gates_of(kind),
    }


def orders_of_peepholes(kind: Kind) -> tuple[str, str]:
    """Return the order of the gates in ONNX's P, and in our peepholes."""
    gates = gates_of(kind)
    return "".join(gate for gate in ORDER[kind.name] if gate in gates), "".join(gates)


def blocks_of(array: Array, units: int) -> Array:
    """Return an array with its last axis divided into blocks of `units`."""
    return array.reshape(*array.shape[:-1], -1, units)


def _starts(
    where: str, kind: Kind, states: dict[str, Constant | None], ways: int, units: int, batch_first: bool
) -> dict[str, Array]:
    """Return the constant initial states `[D, H]` by name; none where they are zeros or come from inputs.

    A learned initial state has equal rows.
    """
    starts: dict[str, Array] = {}
    for key, value in states.items():
        if value is None:
            continue
        array = numbers(value)
        if not array.any():
            if isinstance(value, np.ndarray) and array.shape[-1:] not in ((units,), (1,)):
                raise FormatError(f"{where}: expected {key} of [{ways}, B, {units}], found {array.shape}")
            continue
        try:
            wide = np.broadcast_to(array, np.broadcast_shapes(array.shape, (1, 1, 1)))
            wide = wide.swapaxes(0, 1) if batch_first else wide
            wide = np.broadcast_to(wide, (ways, max(1, wide.shape[1]), units))
        except ValueError:
            raise FormatError(f"{where}: expected {key} of [{ways}, B, {units}], found {array.shape}") from None
        if not np.isfinite(wide).all() or (wide != wide[:, :1]).any():
            raise FormatError(f"{where}: the rows of {key} must be equal")
        starts[key.removeprefix("initial_")] = wide[:, 0]
    if starts:
        starts = {key: starts.get(key, np.zeros((ways, units))) for key in kind.state._fields}
    return starts
