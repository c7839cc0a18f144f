"""ONNX's recurrent operators as cells, and cells as the operators' attributes and inputs.

Ref: ONNX, Operators.md, LSTM, GRU and RNN; DynamicQuantizeLSTM: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cellstack.cells import orders
from cellstack.formats.build import clean
from cellstack.formats.onnx.file import DOMAINS, Constant, Scope, label, short
from cellstack.formats.onnx.fold import numbers
from cellstack.layout import Array, CellArrays, from_rows, reorder, to_rows
from cellstack.network import Network
from cellstack.nodes import Node, Select
from cellstack.nodes.recurrent import Bidirectional, Cell, Recurrent
from cellstack.spec import GATES, CellSpec, FormatError, activation
from cellstack.spec import PARAMETERS as USUAL_PARAMETERS

ORDER = orders("onnx")  # of the gate blocks; ONNX calls g c or h
PEEPHOLES, OUR_PEEPHOLES = "iof", "ifo"
KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn", "DynamicQuantizeLSTM": "lstm"}
MICROSOFT = "com.microsoft"
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
QUANTISED = (*INPUTS, "W_scale", "W_zero_point", "R_scale", "R_zero_point")
SLOTS = {"lstm": ("i", "g", "cell"), "gru": ("z", "g"), "rnn": ("g",)}  # where the activations f, g and h apply
USUAL = {"lstm": ("Sigmoid", "Tanh", "Tanh"), "gru": ("Sigmoid", "Tanh"), "rnn": ("Tanh",)}
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
    usual = node.domain in DOMAINS and node.op_type in ("LSTM", "GRU", "RNN")
    return usual or (node.domain == MICROSOFT and node.op_type == "DynamicQuantizeLSTM")


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
    names = QUANTISED if node.op_type == "DynamicQuantizeLSTM" else INPUTS
    inputs = {key: name for key, name in zip(names, node.input, strict=False) if name}
    if len(node.input) > len(names):
        raise FormatError(f"{where}: expected at most {len(names)} inputs, found {len(node.input)}")
    attributes = model.attributes(node)
    kind = KINDS[node.op_type]
    direction = attributes.get("direction", "forward")
    settings = _settings(where, kind, attributes, direction)
    constants = {key: scope.constant(name) for key, name in inputs.items() if key not in ("X", "sequence_lens")}
    for key in ("W", "R", "B", "P", *names[8:]):
        if (key in inputs or key in ("W", "R")) and not isinstance(constants.get(key), np.ndarray):
            found = _origin(scope, inputs[key]) if key in inputs else "none"
            raise FormatError(f"{where}: expected {key} to be constant, found {found}")
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


def _settings(where: str, kind: str, attributes: dict[str, Any], direction: str) -> list[dict[str, Any]]:
    """Return the cell flags of each direction, from the attributes."""
    unknown = sorted(attributes.keys() - ATTRIBUTES - {"output_sequence"})
    if unknown:
        raise FormatError(f"{where}: unknown attribute {short(unknown[0])}")
    if direction not in DIRECTIONS:
        raise FormatError(f"{where}: expected direction to be one of {', '.join(DIRECTIONS)}, found {short(direction)}")
    each, count = len(USUAL[kind]), 2 if direction == "bidirectional" else 1
    names = attributes.get("activations") or list(USUAL[kind]) * count
    if len(names) != each * count:
        raise FormatError(f"{where}: expected {each * count} activations, found {short(names)}")
    texts = _activations(where, names, attributes)
    flags: dict[str, Any] = {"kind": kind}
    if "clip" in attributes:
        flags["clip"] = decimal(attributes["clip"])
    if kind == "lstm":
        flags["coupled"] = bool(attributes.get("input_forget", 0))
    if kind == "gru":
        flags["reset_after"] = bool(attributes.get("linear_before_reset", 0))
    settings = []
    for d in range(count):
        own = dict(zip(SLOTS[kind], texts[d * each : (d + 1) * each], strict=True))
        given: dict[str, Any] = {"activation": own["g"]}
        if kind != "rnn":
            given["recurrent_activation"] = own[SLOTS[kind][0]]
        if kind == "lstm":
            given["gate_activations"] = {"cell": own["cell"]}
        settings.append({**flags, **given})
    return settings


def _activations(where: str, names: list[str], attributes: dict[str, Any]) -> list[str]:
    """Return activations in cellstack's notation; alpha and beta are assigned, in order, to those that use them."""
    values = [list(attributes.get(key, ())) for key in ("activation_alpha", "activation_beta")]
    texts = []
    for name in names:
        if name not in NAMES:
            raise FormatError(f"{where}: expected activations of {', '.join(NAMES)}, found {short(name)}")
        given = []
        for left, usual in zip(values, PARAMETERS.get(name, ()), strict=False):
            if not left and name in GIVEN:
                raise FormatError(f"{where}: {name} needs alpha and beta")
            given.append(decimal(left.pop(0) if left else usual))
        text = NAMES[name] + (f"({', '.join(map(repr, given))})" if given else "")
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
    given = [attributes.get(key, value) for key, value in zip(("alpha", "beta"), usual, strict=False)]
    parameters = ", ".join(repr(decimal(value)) for value in given)
    return NAMES[node.op_type] + (f"({parameters})" if given else "")


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
    kind: str,
    arrays: dict[str, Array],
    settings: list[dict[str, Any]],
    hidden: int | None,
    states: dict[str, Constant | None],
    batch_first: bool,
) -> tuple[Cell, ...]:
    """Return the cell of each direction."""
    ways, gates = len(settings), len(GATES[kind])
    weights, recurrent = arrays["W"], arrays["R"]
    units = recurrent.shape[-1] if recurrent.ndim == 3 else 0
    if hidden is not None and hidden != units:
        raise FormatError(f"{where}: expected R [{ways}, {gates}·H, H] with H={short(hidden)}, found {recurrent.shape}")
    wide = gates * units
    wanted = {"W": (ways, wide, weights.shape[-1] if weights.ndim == 3 else 0), "R": (ways, wide, units)}
    wanted |= {"B": (ways, 2 * wide), "P": (ways, 3 * units)}
    dtype = np.dtype(np.float64 if weights.dtype == np.float64 else np.float32)
    for key, shape in wanted.items():
        if key in arrays and (arrays[key].shape != shape or 0 in shape):
            raise FormatError(f"{where}: expected {key} of shape {list(shape)}, found {list(arrays[key].shape)}")
        if key in arrays and arrays[key].dtype.kind != "f":
            raise FormatError(f"{where}: expected {key} as floats, found {arrays[key].dtype}")
    arrays = {key: value.astype(dtype) for key, value in arrays.items() if key in wanted}
    starts = _starts(where, states, ways, units, batch_first)
    cells = []
    for d, flags in enumerate(settings):
        given: dict[str, Any] = {"use_bias": "B" in arrays, "peepholes": "P" in arrays and kind == "lstm"}
        try:
            spec = CellSpec(weights.shape[2], units, **flags, **given, learn_initial_state=bool(starts))
        except (ValueError, TypeError) as error:
            raise FormatError(f"{where}: {str(error)[:200]}") from None
        biases = tuple(np.split(arrays["B"][d], 2)) if "B" in arrays else ()
        rows = from_rows(kind, arrays["W"][d], arrays["R"][d], biases, ORDER[kind], spec.reset_after)
        own: dict[str, Any] = rows._asdict()
        if spec.peepholes:
            own["peepholes"] = reorder(arrays["P"][d], PEEPHOLES, OUR_PEEPHOLES).reshape(3, units)
        if spec.coupled:  # f is 1 - i: its weights exist, but the operator ignores them
            own = {name: None if a is None else _without_f(name, a, units) for name, a in own.items()}
        own |= {f"initial_{key}": values[d].astype(dtype) for key, values in starts.items() if key in spec.state_sizes}
        cells.append(Cell(spec, **own))
    return tuple(cells)


def _without_f(name: str, array: Array, units: int) -> Array:
    if name == "peepholes":
        return array[[0, 2]]
    return np.concatenate([array[..., :units], array[..., 2 * units :]], axis=-1)


def _starts(
    where: str, states: dict[str, Constant | None], ways: int, units: int, batch_first: bool
) -> dict[str, Array]:
    """Return the constant initial states `[D, H]` by name; none where they are zeros or come from inputs.

    A learned initial state has equal rows.
    """
    found: dict[str, Array] = {}
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
        found[key.removeprefix("initial_")] = wide[:, 0]
    if found:
        found = {key: found.get(key, np.zeros((ways, units))) for key in ("h", "c")}
    return found


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────

NOT_IN_ONNX = {"proj_size": 0, "layer_norm": False, "cell_clip": None, "zoneout": 0.0, "zoneout_cell": 0.0}
ONNX_NAMES = {ours: theirs for theirs, ours in NAMES.items()} | {"linear": "Affine"}


class Written(NamedTuple):
    """A recurrent operator to be written: its attributes, and its inputs by name, except X and the states."""

    kind: str
    arrays: dict[str, Array]
    attributes: dict[str, Any]


def write_operator(where: str, cells: tuple[Cell, ...], direction: str) -> Written:
    """Return cells, one per direction, as one recurrent operator.

    Raises:
        ValueError: a flag that the operator lacks, or that differs between the directions.
    """
    first = cells[0].spec
    for cell in cells:
        for flag, usual in NOT_IN_ONNX.items():
            if getattr(cell.spec, flag) != usual:
                raise ValueError(f"save: {where}: ONNX's {first.kind.upper()} has no {flag}")
        alike = ("kind", "input_size", "units", "clip", "coupled", "reset_after", "peepholes", "use_bias")
        for flag in alike:
            if getattr(cell.spec, flag) != getattr(first, flag):
                raise ValueError(f"save: {where}: ONNX needs the same {flag} forward and backward")
        named = dict(zip(cell.spec.slots, cell.spec.activations, strict=True))
        apart = [("f", "i"), ("o", "i")] if first.kind == "lstm" else [("r", "z")] if first.kind == "gru" else []
        for gate, other in apart:
            if named[gate] != named[other] and not (gate == "f" and cell.spec.coupled):
                raise ValueError(f"save: {where}: ONNX needs the same activation for gates {other} and {gate}")
    rows = [_rows(cell) for cell in cells]
    arrays = {key: np.ascontiguousarray(np.stack([row[key] for row in rows])) for key in rows[0]}
    attributes: dict[str, Any] = {"hidden_size": first.units, "direction": direction}
    attributes |= _written_activations(cells)
    if first.clip is not None:
        attributes["clip"] = float(first.clip)
    if first.coupled:
        attributes["input_forget"] = 1
    if first.kind == "gru":
        attributes["linear_before_reset"] = int(first.reset_after)
    return Written(first.kind.upper(), arrays, attributes)


def _rows(cell: Cell) -> dict[str, Array]:
    """Return a cell's arrays in ONNX's layout, without the direction axis."""
    spec, units = cell.spec, cell.spec.units
    own = {name: a for name, a in cell.arrays.items() if name in ("kernel", "recurrent_kernel", "bias", "peepholes")}
    if spec.coupled:
        own = {name: _with_f(name, a, units) for name, a in own.items()}
    weight, recurrent, bias = to_rows(
        spec.kind, CellArrays(own["kernel"], own["recurrent_kernel"], own.get("bias")), ORDER[spec.kind]
    )
    rows = {"W": weight, "R": recurrent}
    if bias is not None:
        rows["B"] = bias.reshape(-1) if bias.ndim == 2 else np.concatenate([bias, np.zeros_like(bias)])
    if spec.peepholes:
        rows["P"] = reorder(own["peepholes"].reshape(-1), OUR_PEEPHOLES, PEEPHOLES)
    return rows


def _with_f(name: str, array: Array, units: int) -> Array:
    """Return an array of a coupled cell with a block of zeros for f."""
    if name == "peepholes":
        return np.stack([array[0], np.zeros_like(array[0]), array[1]])
    return np.concatenate([array[..., :units], np.zeros_like(array[..., :units]), array[..., units:]], axis=-1)


def _written_activations(cells: tuple[Cell, ...]) -> dict[str, Any]:
    names, alphas, betas = [], [], []
    for cell in cells:
        named = dict(zip(cell.spec.slots, cell.spec.activations, strict=True))
        for slot in SLOTS[cell.spec.kind]:
            name, alpha, beta = named[slot]
            names.append(ONNX_NAMES[name])
            count = len(PARAMETERS.get(names[-1], ()))
            if count:
                alphas.append(1.0 if name == "linear" else alpha)
            if count == 2:
                betas.append(beta)
    attributes = {"activations": names, "activation_alpha": alphas, "activation_beta": betas}
    return {key: value for key, value in attributes.items() if value}
