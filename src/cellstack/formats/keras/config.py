"""Reads the model descriptions of all Keras versions: layers, and the tensors that they take from each other.

Keras 1 and 2 list a layer's inputs as `[[["lstm_1", 0, 0, {}]]]`, Keras 3 as arguments in which tensors are dicts with
a `keras_history`. Both become `LayerCall`s here; no other module depends on the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cellstack.cells.errors import FormatError
from cellstack.formats.keras.files import ModelFile, short

MODELS = ("Sequential", "Functional", "Model", "ModelV2")  # the latter two: Keras 1 and 2
DEEPEST = 16  # models within models
BIGGEST = 2**31 - 1
OPERATION = "ops."  # prefix of the names of Keras 3's operations: some layers have the same names
LAMBDAS = ("TFOpLambda", "SlicingOpLambda")  # how TensorFlow's Keras lists functions among the layers
TYPED = ("Cast", "ZerosLike", "OnesLike")  # the operations that have a dtype, as layers do
OURS = "cellstack>"  # prefix of the names of cellstack.keras's layers
CONSTANT = "_CONSTANT_VALUE"  # marks a number that TensorFlow's Keras lists among the tensors


class Ref(NamedTuple):
    """A tensor: the layer that returned it, the number of that call, and the index among the values it returned."""

    layer: str
    call: int = 0
    tensor: int = 0


class LayerCall(NamedTuple):
    """One call of a layer: positional tensors and other positional values, then tensors and other values by name.

    `arguments` are all positional arguments in their order, on which an operation's result depends: 1 - x isn't x - 1.
    """

    inputs: tuple[Ref, ...]
    others: tuple[Any, ...] = ()
    named: tuple[tuple[str, Ref], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[Any, ...] = ()

    @property
    def refs(self) -> tuple[Ref, ...]:
        """All its tensors, positional and named."""
        return (*self.inputs, *(ref for _, ref in self.named))


@dataclass
class Layer:
    """A layer as the file describes it.

    `config` holds its settings, `model` its contents if it is a model itself, `inner` the layer that a TimeDistributed
    wraps.
    """

    where: str
    name: str
    kind: str
    config: dict[str, Any]
    calls: tuple[LayerCall, ...] = ()
    model: Model | None = None
    inner: Layer | None = None

    @property
    def operation(self) -> bool:
        """Whether it is a function that the file lists among its layers; it has no weights, and drops masks."""
        return self.kind.startswith(OPERATION) or self.kind in LAMBDAS

    def refuse(self, why: str) -> FormatError:
        """Return the error that says why this layer can't be read."""
        return FormatError(f"{self.where}: {why}")

    def get(self, name: str, kind: type | tuple[type, ...], *usual: Any) -> Any:
        """Return a setting after checking its type; if it is missing or None, `usual`, or else a `FormatError`."""
        value = self.config.get(name)
        if value is None and usual:
            return usual[0]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = "/".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise self.refuse(f"expected {name} to be {names}, found {short(value)}")
        return value

    def integer(self, name: str, *usual: int, least: int = 1) -> int:
        """Return an integer setting; Keras writes some as a list of one."""
        value = self.config.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if value is None and usual:
            return usual[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= BIGGEST:
            raise self.refuse(f"expected {name} to be an integer of at least {least}, found {short(value)}")
        return value

    def flag(self, name: str, usual: bool = False) -> bool:
        """Return a boolean setting."""
        return self.get(name, bool, usual)

    def axis(self, name: str) -> int | None:
        """Return an axis as the file counts it; None if it gives none or several."""
        value = self.config.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def check_channels_last(self) -> None:
        """Raise `FormatError` unless the features are on the last axis."""
        data_format = self.config.get("data_format")
        if data_format not in (None, "channels_last"):
            raise self.refuse(f"expected data_format channels_last, found {short(data_format)}")

    def within(self, entry: Any, what: str) -> Layer:
        """Return a layer that this one wraps, described in one of its settings."""
        return layer_of(f"{self.where}: {what}", entry, 0)


@dataclass
class Model:
    """A model: its layers in the file's order, its input and its output tensors."""

    name: str
    kind: str
    layers: list[Layer] = field(default_factory=list)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)


def snake(name: str) -> str:
    """Return a class's name as Keras 3 writes it in weights' names: `TimeDistributed` is `time_distributed`.

    >>> snake("LSTM"), snake("ReLU"), snake("Conv1D"), snake("StackedRNNCells")
    ('lstm', 're_lu', 'conv1d', 'stacked_rnn_cells')
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def numbered(kinds: list[str]) -> list[str]:
    """Return the names under which Keras 3 stores the members of a list: their classes' names, numbered if repeated.

    The package of a class isn't part of the name.

    >>> numbered(["LSTM", "Dense", "LSTM"])
    ['lstm', 'dense', 'lstm_1']
    """
    seen: dict[str, int] = {}
    names = []
    for kind in (snake(kind.rpartition(">")[2]) for kind in kinds):
        seen[kind] = seen.get(kind, -1) + 1
        names.append(f"{kind}_{seen[kind]}" if seen[kind] else kind)
    return names


def model_of(source: ModelFile, config: Any) -> Model:
    """Return the model in a file's description, or in a list of consecutive layers.

    Raises:
        FormatError: it isn't such a description.
    """
    if isinstance(config, list):
        config = {"class_name": "Sequential", "config": config}
    entry = config if isinstance(config, dict) and "class_name" in config else {"config": config}
    kind = entry.get("class_name") or ("Functional" if isinstance(config, dict) and "input_layers" in config else "")
    kind = _class({**entry, "class_name": kind}) if isinstance(kind, str) else kind
    if kind not in MODELS:
        raise FormatError(f"{source.path}: expected a Sequential or functional model, found {short(kind or config)}")
    return _model(source.path, kind, entry.get("config"), 0)


def _model(where: str, kind: str, config: Any, depth: int) -> Model:
    if depth > DEEPEST:
        raise FormatError(f"{where}: models are nested more than {DEEPEST} deep")
    listed = config if isinstance(config, list) else config.get("layers") if isinstance(config, dict) else None
    if not isinstance(listed, list):
        raise FormatError(f"{where}: expected the layers of the model, found {short(config)}")
    name = config.get("name") if isinstance(config, dict) else None
    model = Model(name if isinstance(name, str) else kind.lower(), kind)
    model.layers = [layer_of(where, entry, depth) for entry in listed]
    sequential = kind == "Sequential"
    if sequential:
        _chain(model, config)
    names = [layer.name for layer in model.layers]
    if len(set(names)) != len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise FormatError(f"{where}: two layers have the name {short(twice)}")
    if not sequential:
        ends = config if isinstance(config, dict) else {}
        model.inputs = _refs(where, "input_layers", ends.get("input_layers"))
        model.outputs = _refs(where, "output_layers", ends.get("output_layers"))
    return model


def _chain(model: Model, config: Any) -> None:
    """Add to the layers of a Sequential model the calls that a functional model would list."""
    if not model.layers or model.layers[0].kind != "InputLayer":
        first = model.layers[0].config if model.layers else {}
        shape = first.get("batch_input_shape") or first.get("batch_shape")
        if shape is None and isinstance(config, dict):
            shape = config.get("build_input_shape")
        taken = {layer.name for layer in model.layers}
        name = next(word for word in ("x", "input", "sequential_input") if word not in taken)
        where = model.layers[0].where if model.layers else ""
        model.layers.insert(0, Layer(where, name, "InputLayer", {"batch_shape": shape}))
    before = model.layers[0]
    for layer in model.layers[1:]:
        layer.calls = (LayerCall((Ref(before.name),)),)
        before = layer
    model.inputs, model.outputs = [Ref(model.layers[0].name)], [Ref(before.name)]


def layer_of(where: str, entry: Any, depth: int) -> Layer:
    """Return the layer in an entry of a description."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise FormatError(f"{where}: expected a layer with a class_name, found {short(entry)}")
    kind, config = entry["class_name"], entry.get("config")
    settings = config if isinstance(config, dict) else {}
    name = settings.get("name", entry.get("name"))
    if not isinstance(name, str):
        name = snake(kind)
    where = f"{where}: {kind[:60]} {short(name)}"
    kind = _class(entry)
    if kind in MODELS:
        layer = Layer(where, name, kind, settings, model=_model(where, kind, config, depth + 1))
    elif isinstance(config, dict):
        layer = Layer(where, name, kind, settings)
        if kind == "TimeDistributed":
            if depth > DEEPEST:
                raise FormatError(f"{where}: layers are nested more than {DEEPEST} deep")
            layer.inner = layer_of(f"{where}: layer", config.get("layer"), depth + 1)
    else:
        raise FormatError(f"{where}: expected its settings, found {short(config)}")
    nodes = entry.get("inbound_nodes") or []
    if not isinstance(nodes, list):
        raise FormatError(f"{where}: expected a list of inbound_nodes, found {short(nodes)}")
    layer.calls = tuple(_call(where, node) for node in nodes)
    return layer


def _class(entry: dict[str, Any]) -> str:
    """Return the name of a layer's class; classes that aren't Keras's own have their package as a prefix."""
    kind, module, registered = entry["class_name"], entry.get("module"), entry.get("registered_name")
    calls, settings = entry.get("inbound_nodes"), entry.get("config")
    if isinstance(module, str):
        operation = re.match(r"keras\.(src\.)?ops(\.|$)", module)
    else:  # Keras 3 stores no module in HDF5; but every layer has a dtype there, and few operations do
        called = isinstance(calls, list) and any(isinstance(one, dict) for one in calls)
        words = {"trainable"} if kind in TYPED else {"trainable", "dtype"}
        plain = isinstance(settings, dict) and not words & settings.keys()
        operation = called and plain and kind not in MODELS
    if operation:
        return f"{OPERATION}{kind}"
    if isinstance(registered, str) and registered.startswith(OURS):
        return registered
    if isinstance(module, str) and not re.match(r"(tensorflow\.(python\.)?|tf_)?keras(\.|$)", module):
        return f"{module}>{kind}"
    if isinstance(registered, str) and registered != kind:
        return registered if ">" in registered else f">{registered}"
    return kind


def _call(where: str, node: Any) -> LayerCall:
    if isinstance(node, dict):  # Keras 3
        args, kwargs = node.get("args"), node.get("kwargs")
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise FormatError(f"{where}: expected args and kwargs of a call, found {short(node)}")
        inputs: list[Ref] = []
        others: list[Any] = []
        for value in args:
            for one in _flat(value) if any(map(_is_tensor, _flat(value))) else [value]:
                if _is_tensor(one):
                    inputs.append(_history(where, one))
                else:
                    others.append(one)
        arguments = tuple(_placed(where, value, 0) for value in args)
        named, settings = [], []
        for name, value in kwargs.items():
            tensors = [one for one in _flat(value) if _is_tensor(one)]
            named += [(name, _history(where, one)) for one in tensors]
            if not tensors:
                settings.append((name, value))
        return LayerCall(tuple(inputs), tuple(others), tuple(named), tuple(settings), arguments)
    if isinstance(node, list):  # Keras 1 and 2
        refs, others, places, named, settings = [], [], [], [], []
        alone = bool(node) and isinstance(node[0], str)
        for entry in [node] if alone else node:
            if isinstance(entry, list) and len(entry) > 2 and entry[0] == CONSTANT:
                others.append(entry[2])
                places.append(_placed(where, entry[2], 0))
            else:
                refs.append(_ref(where, entry))
                places.append(refs[-1])
            for name, value in (entry[3] if len(entry) > 3 and isinstance(entry[3], dict) else {}).items():
                listed = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
                tensors = [one for one in listed if _is_ref(one)]
                named += [(name, _ref(where, one)) for one in tensors]
                if not tensors and (name, value) not in settings:
                    settings.append((name, _placed(where, value, 0)))
        arguments = tuple(places) if alone or len(places) == 1 else (places,)
        return LayerCall(tuple(refs), tuple(others), tuple(dict.fromkeys(named)), tuple(settings), arguments)
    raise FormatError(f"{where}: expected a call of the layer, found {short(node)}")


def _placed(where: str, value: Any, depth: int) -> Any:
    """Return an argument with every tensor replaced by a `Ref`."""
    if isinstance(value, list):
        if depth > DEEPEST:
            raise FormatError(f"{where}: lists are nested more than {DEEPEST} deep")
        return [_placed(where, one, depth + 1) for one in value]
    return _history(where, value) if _is_tensor(value) else value


def _flat(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield a value, or the elements of nested lists: states of stacked cells are lists of lists."""
    if isinstance(value, list) and depth < DEEPEST:
        for one in value:
            yield from _flat(one, depth + 1)
    else:
        yield value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and value.get("class_name") == "__keras_tensor__"


def _history(where: str, tensor: Any) -> Ref:
    config = tensor.get("config")
    return _ref(where, config.get("keras_history") if isinstance(config, dict) else None)


def _is_ref(entry: Any) -> bool:
    fits = isinstance(entry, list) and len(entry) >= 3 and isinstance(entry[0], str)
    return fits and all(type(number) is int and 0 <= number <= BIGGEST for number in entry[1:3])


def _ref(where: str, entry: Any) -> Ref:
    if not _is_ref(entry):
        raise FormatError(f"{where}: expected a tensor as [layer, call, number], found {short(entry)}")
    return Ref(*entry[:3])


def _refs(where: str, what: str, entries: Any) -> list[Ref]:
    """Return the inputs or outputs of a model: one, a list of them, or a dict of them."""
    if isinstance(entries, dict):
        entries = list(entries.values())
    if isinstance(entries, list) and len(entries) == 3 and isinstance(entries[0], str):
        entries = [entries]
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"{where}: expected {what}, found {short(entries)}")
    return [_ref(f"{where}: {what}", entry) for entry in entries]
