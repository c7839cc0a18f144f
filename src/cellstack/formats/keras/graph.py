"""From the layers of a Keras model to a Network: what goes where, and where masks go."""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

from cellstack.formats.keras.config import Call, Layer, Model, Ref
from cellstack.formats.keras.files import short
from cellstack.formats.keras.layers import MERGES, NOTHING
from cellstack.formats.keras.weights import OPERATIONS, Built
from cellstack.network import Network
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Embedding,
    Flatten,
    LayerNorm,
    Masking,
    Merge,
    Node,
    Permute,
    Pool,
    Recurrent,
    Reshape,
    Scale,
    Standardise,
)
from cellstack.nodes import Dense as DenseNode
from cellstack.spec import FormatError

MOST_NODES = 10_000  # a model may be used twice by one that is used twice, and so on
AXES = ("BatchNormalization", "LayerNormalization", "Normalization", "Softmax")
KEEPS_MASK = (Activation, DenseNode, LayerNorm, Masking, Scale, Standardise)


class Value(NamedTuple):
    """A tensor: what returns it; the mask that goes with it; and, where it is itself a mask, which one.

    Masks are compared by how they come about: `("ne", wire, number)` says where a value differs from a number,
    `("any", …)` that one of its features does.
    """

    wire: str
    mask: Any = None
    flag: Any = None


class Wiring:
    """Lays the nodes of a model out as a graph.

    Args:
        built: the nodes of every layer.
        major: the version of Keras.

    Attributes:
        problems: what can't be done, by layer.
    """

    def __init__(self, built: Built, major: int) -> None:
        self.built, self.major = built, major
        self.nodes: list[Node] = []
        self.names: list[str] = []
        self.wires: list[tuple[str, ...]] = []
        self.inputs: dict[str, tuple[int | None, ...] | None] = {}
        self.problems: list[str] = []
        self.axes: list[tuple[Layer, str]] = []  # layers that name an axis, and what they take
        self._taken: set[str] = set()

    def network(self, model: Model, metadata: dict[str, Any]) -> Network:
        """Return the whole model as a Network; ValueError where its parts don't meet."""
        layers = {layer.name: layer for layer in model.layers}
        values = []
        for ref in model.inputs:
            layer = layers.get(ref.layer)
            if layer is None:
                raise FormatError(f"expected every input to be a layer, found {short(ref.layer)}")
            name = self._unique(layer.name)
            self.inputs[name] = _shape(layer)
            values.append(Value(name))
        outputs = self._run(model, "", values)
        if self.problems:
            return _nothing(self.problems)
        wires = []
        for value in outputs:
            assert value is not None
            if value.wire in self.inputs or value.wire in wires:  # a Network's outputs are nodes, each once
                value = self._emit("output", Activation("linear"), [value])
            wires.append(value.wire)
        try:
            network = Network(self.nodes, self.names, metadata, inputs=self._loose(), wires=self.wires, outputs=wires)
        except (ValueError, TypeError) as error:  # layers that don't meet: it may be that one takes another axis
            others = [layer for layer, _ in self.axes if layer.axis("axis") != -1]
            return _nothing([str(error)[:300], *map(self._axis, others)])
        others = [layer for layer, wire in self.axes if layer.axis("axis") not in (-1, len(network.shapes[wire]))]
        return _nothing([*map(self._axis, others)]) if others else network

    @staticmethod
    def _axis(layer: Layer) -> str:
        found = short(layer.config.get("axis"))
        return str(layer.refuse(f"expected axis -1, the features, found {found}"))

    def _loose(self) -> dict[str, tuple[int | None, ...] | None]:
        """Return the inputs' shapes; sequences of any length where no node needs the one that the file names."""
        if any(
            isinstance(node, (Flatten, Reshape)) or (isinstance(node, Permute) and node.dims != (1, 2))
            for node in self.nodes
        ):
            return self.inputs
        loose = dict(self.inputs)
        for name, shape in self.inputs.items():
            takers = [node for node, sources in zip(self.nodes, self.wires, strict=True) if name in sources]
            ids = bool(takers) and all(isinstance(node, Embedding) for node in takers)
            if shape is not None and (len(shape) == 2 or (len(shape) == 1 and ids)):
                loose[name] = (None, *shape[1:])
        return loose

    def _unique(self, name: str) -> str:
        name = name.replace("/", ".") or "layer"
        number, found = 1, name
        while found in self._taken:
            number += 1
            found = f"{name}.{number}"
        self._taken.add(found)
        return found

    def _emit(self, name: str, node: Node, values: list[Value]) -> Value:
        if len(self.nodes) >= MOST_NODES:
            raise FormatError(f"expected at most {MOST_NODES} nodes, found more")
        name = self._unique(name)
        self.nodes.append(node)
        self.names.append(name)
        self.wires.append(tuple(value.wire for value in values))
        return Value(name)

    def _run(self, model: Model, scope: str, given: list[Value]) -> list[Value | None]:
        """Run a model over values: each call of each layer once what it takes is there, in the file's order."""
        values: dict[tuple[str, int], list[Value | None]] = {}
        ready: list[int] = []
        calls: list[tuple[Layer, int, Call]] = []
        inputs = {ref.layer for ref in model.inputs}
        for ref, value in zip(model.inputs, given, strict=True):
            values[ref.layer, 0] = [value]
        for layer in model.layers:
            if layer.name not in inputs:
                calls += [(layer, number, call) for number, call in enumerate(layer.calls)]
        missing = []
        waiting: dict[tuple[str, int], list[int]] = {}
        for number, (_, _, call) in enumerate(calls):
            sources = {ref[:2] for ref in (*call.inputs, *(ref for _, ref in call.named))} - values.keys()
            missing.append(len(sources))
            for source in sources:
                waiting.setdefault(source, []).append(number)
            if not sources:
                heapq.heappush(ready, number)
        while ready:
            layer, number, call = calls[heapq.heappop(ready)]
            values[layer.name, number] = self._call(layer, call, values, scope)
            for one in waiting.get((layer.name, number), ()):
                missing[one] -= 1
                if not missing[one]:
                    heapq.heappush(ready, one)
        stuck = [layer.where for (layer, _, _), count in zip(calls, missing, strict=True) if count]
        if stuck:
            raise FormatError(
                f"{stuck[0]}: expected to take what earlier layers return, found a circle or no such layer"
            )
        return [self._tensor(values, ref, f"the outputs of {short(model.name)}") for ref in model.outputs]

    def _tensor(self, values: dict[tuple[str, int], list[Value | None]], ref: Ref, where: str) -> Value | None:
        found = values.get(ref[:2])
        if found is None:
            raise FormatError(f"{where}: expected a tensor that a layer returns, found {list(ref)}")
        if ref.tensor >= len(found):
            what = f"value {ref.tensor} of layer {short(ref.layer)}, such as a state"
            self._problem(f"{where}: takes {what}, which a node doesn't hand on")
            return None
        return found[ref.tensor]

    def _call(
        self, layer: Layer, call: Call, values: dict[tuple[str, int], list[Value | None]], scope: str
    ) -> list[Value | None]:
        given = [self._tensor(values, ref, layer.where) for ref in call.inputs]
        named = [(name, self._tensor(values, ref, layer.where)) for name, ref in call.named]
        outputs = [None] * (1 if layer.model is None else len(layer.model.outputs))
        why = self.built.refused.get(id(layer))
        if why is not None:
            self._problem(why)
            return list(outputs)
        inputs = [value for value in given if value is not None]
        if len(inputs) < len(given) or any(value is None for _, value in named):
            return list(outputs)
        try:
            if layer.kind in OPERATIONS:
                return [_operation(layer, call, inputs)]
            self._check_call(layer, call, inputs, [(name, value) for name, value in named if value is not None])
            if layer.model is not None:
                if len(inputs) != len(layer.model.inputs):
                    raise layer.refuse(f"expected {len(layer.model.inputs)} tensors, found {len(inputs)}")
                return self._run(layer.model, f"{scope}{layer.name}.", inputs)
            return [self._apply(layer, inputs, f"{scope}{layer.name}")]
        except FormatError as error:
            self._problem(str(error))
            return list(outputs)

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def _check_call(self, layer: Layer, call: Call, inputs: list[Value], named: list[tuple[str, Value]]) -> None:
        for name, value in named:
            if name != "mask":
                raise layer.refuse(f"{name} comes from another layer, which a node doesn't take")
            if len(inputs) != 1 or value.flag is None or value.flag != inputs[0].mask:
                raise layer.refuse("expected the mask that its sequence brings along, found another")
        odd = [name for name, value in call.settings if value is not None and name not in ("training", "mask")]
        odd += [name for name, value in call.settings if value is not None and name == "mask"]
        odd += [short(value) for value in call.others if value is not None]
        if odd:
            raise layer.refuse(f"expected a call with tensors alone, found {', '.join(odd)}")
        if any(value.flag is not None for value in inputs):
            raise layer.refuse("expected numbers, found a mask")
        if layer.model is None and layer.kind not in MERGES and layer.kind != "Merge" and len(inputs) != 1:
            raise layer.refuse(f"expected one tensor, found {len(inputs)}: an initial state from the graph isn't taken")

    def _apply(self, layer: Layer, inputs: list[Value], name: str) -> Value:
        nodes = self.built.nodes[id(layer)]
        value = inputs[0]
        if layer.kind in AXES and layer.config.get("axis") is not None:
            self.axes.append((layer, value.wire))
        if layer.kind == "Softmax" and value.mask is not None:
            raise layer.refuse("a softmax over masked features isn't what a Network has")
        if layer.kind == "GlobalMaxPooling1D" and value.mask is not None:  # Keras takes the greatest of all steps
            value = self._emit(f"{name}.all_steps", Permute((1, 2)), [value])
        if not nodes and layer.kind not in (*NOTHING, "InputLayer", "TimeDistributed"):
            raise layer.refuse("expected a layer that computes something")
        for node in nodes:
            values = inputs if isinstance(node, Merge) else [value]
            mask = self._mask(layer, node, values)
            value = self._emit(name, node, values)._replace(mask=mask)
        return value

    def _mask(self, layer: Layer, node: Node, values: list[Value]) -> Any:
        """Return the mask that goes on after a node: as the node has it, which must be as Keras has it."""
        mask = values[0].mask
        if isinstance(node, Embedding):
            return ("ne", values[0].wire, 0.0) if node.mask_zero else mask
        if isinstance(node, Masking):
            return ("any", ("ne", values[0].wire, float(node.value)))
        if isinstance(node, Merge):
            masks = [value.mask for value in values]
            if all(one == mask for one in masks) and not (
                node.mode == "concat" and node.axis == 1 and mask is not None
            ):
                return mask
            if self.major < 3:
                raise layer.refuse("merges sequences of different masks, for which Keras 2 has a rule of its own")
            return None if None in masks and node.mode != "concat" else ("merged", layer.name, *masks)
        if isinstance(node, Recurrent) and mask is not None and node.go_backwards and node.return_sequences:
            raise layer.refuse("returns a masked sequence backwards, while Keras leaves the mask as it was")
        if isinstance(node, (Recurrent, Bidirectional)):
            stack = node.forward if isinstance(node, Bidirectional) else node
            return mask if stack.return_sequences else None
        return mask if isinstance(node, KEEPS_MASK) and not isinstance(node, Pool) else None


def _operation(layer: Layer, call: Call, inputs: list[Value]) -> Value:
    """Return what one of the operations returns by which Keras 3 writes down a mask."""
    if layer.kind == "NotEqual" and len(inputs) == 1 and len(call.others) == 1 and inputs[0].flag is None:
        number = call.others[0]
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return Value(inputs[0].wire, None, ("ne", inputs[0].wire, float(number)))
    elif layer.kind == "Any" and len(inputs) == 1 and inputs[0].flag is not None and layer.axis("axis") == -1:
        return Value(inputs[0].wire, None, ("any", inputs[0].flag))
    elif layer.kind == "LogicalOr" and len(inputs) == 2 and inputs[0].flag == inputs[1].flag is not None:
        return inputs[0]
    raise layer.refuse("an operation that a Network hasn't")


def _shape(layer: Layer) -> tuple[int | None, ...] | None:
    shape = layer.config.get("batch_shape") or layer.config.get("batch_input_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) < 2:
        raise layer.refuse(f"expected an input [B, ...], found {short(shape)}")
    return tuple(shape[1:])


def _nothing(problems: list[str]) -> Any:
    raise ProblemsError(problems)


class ProblemsError(FormatError):
    """What stands in the way of a Network, all of it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
