"""Builds a Network from the layers of a Keras model: connects its values and tracks the masks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.formats.build import Builder, TooMuchError
from cellstack.formats.keras.cells import FLAGGED, RECURRENT, flagged
from cellstack.formats.keras.composed import composer, returned
from cellstack.formats.keras.config import Layer, LayerCall, Model, Ref
from cellstack.formats.keras.files import short
from cellstack.formats.keras.frames import at_every_frame
from cellstack.formats.keras.layer_builder import Followed, LayerBuilder, Pending, Value
from cellstack.formats.keras.layers import MERGES, NOTHING
from cellstack.formats.keras.operations import either, operate
from cellstack.formats.keras.weights import Built
from cellstack.network import Network
from cellstack.nodes import Masking, Merge, Node, Recurrent, Select, StepMask
from cellstack.nodes.base import MOST_AXES, Shape
from cellstack.nodes.checks import MOST

MANY = (*MERGES, "Merge", "Dot")  # layers that take several tensors
Values = dict[tuple[str, int], list[Value | Pending | None]]  # by layer and call; None = a problem is already recorded


class Reader:
    """Reads the layers of a model in the order in which they run.

    Attributes:
        builder: the network's builder.
        dtype: the dtype of the weights.
        followed: the masks of concatenated sequences.
    """

    def __init__(self, built: Built, major: int) -> None:
        self.built, self.major = built, major
        self.builder, self.followed = Builder(), Followed()
        arrays = (node.dtype for nodes in built.nodes.values() for node in nodes if node.dtype is not None)
        self.dtype: np.dtype[Any] = next(arrays, np.dtype(np.float32))

    def network(self, model: Model, metadata: dict[str, Any]) -> Network:
        """Return the whole model as a Network; raise ValueError if the shapes of its parts don't match."""
        layers = {layer.name: layer for layer in model.layers}
        values = []
        for ref in model.inputs:
            layer = layers.get(ref.layer)
            if layer is None:
                raise FormatError(f"expected every input to be a layer, found {short(ref.layer)}")
            values.append(Value(self.builder.input(layer.name, _shape(layer))))
        outputs = self._run(model, "", values)
        self.builder.check()
        for value in outputs:
            assert value is not None
            self.builder.output(value.wire)
        return self.builder.network(metadata)

    def _run(self, model: Model, scope: str, given: list[Value], framed: bool = False) -> list[Value | None]:
        """Add the nodes of a model's calls: each call once its inputs are available, in the file's order.

        Args:
            model: the model.
            scope: the prefix of its layers' names.
            given: the model's inputs.
            framed: whether each layer is applied to every step of a sequence separately.
        """
        values: Values = {}
        ready: list[int] = []
        calls: list[tuple[Layer, int, LayerCall]] = []
        inputs = {ref.layer for ref in model.inputs}
        for ref, value in zip(model.inputs, given, strict=True):
            values[ref.layer, 0] = [value]
        for layer in model.layers:
            if layer.name not in inputs:
                calls += [(layer, number, call) for number, call in enumerate(layer.calls)]
        first = _first_calls(model)
        missing = []
        waiting: dict[tuple[str, int], list[int]] = {}
        for number, (_, _, call) in enumerate(calls):
            sources = {ref[:2] for ref in call.refs} - values.keys()
            missing.append(len(sources))
            for source in sources:
                waiting.setdefault(source, []).append(number)
            if not sources:
                heapq.heappush(ready, number)
        while ready:
            layer, number, call = calls[heapq.heappop(ready)]
            number += first.get(layer.name, 0)
            values[layer.name, number] = self._call(layer, call, values, scope, framed)
            for one in waiting.get((layer.name, number), ()):
                missing[one] -= 1
                if not missing[one]:
                    heapq.heappush(ready, one)
        stuck = [layer.where for (layer, _, _), count in zip(calls, missing, strict=True) if count]
        if stuck:
            raise FormatError(f"{stuck[0]}: its inputs form a cycle, or come from a layer that isn't in the model")
        return [self._tensor(values, ref, f"the outputs of {short(model.name)}") for ref in model.outputs]

    def _tensor(self, values: Values, ref: Ref, where: str) -> Value | None:
        returned_values = values.get(ref[:2])
        if returned_values is None:
            raise FormatError(f"{where}: expected a tensor that a layer returns, found {list(ref)}")
        if ref.tensor >= len(returned_values):
            count = len(returned_values)
            self._problem(f"{where}: takes value {ref.tensor} of layer {short(ref.layer)}, which returns only {count}")
            return None
        value = returned_values[ref.tensor]
        if value is None or isinstance(value, Value):
            return value
        try:
            computed = value()
        except TooMuchError:
            raise
        except FormatError as error:
            self._problem(str(error))
            computed = None
        returned_values[ref.tensor] = computed
        return computed

    def _call(
        self, layer: Layer, call: LayerCall, values: Values, scope: str, framed: bool
    ) -> list[Value | Pending | None]:
        refs = dict.fromkeys(call.refs)
        known = {ref: self._tensor(values, ref, layer.where) for ref in refs}
        count = 1 if layer.model is None else len(layer.model.outputs)
        outputs: list[Value | Pending | None] = [None] * count
        why = self.built.refused.get(id(layer))
        if why is not None:
            self._problem(why)
            return outputs
        if None in known.values():
            return outputs
        there = {ref: value for ref, value in known.items() if value is not None}
        inputs, named = [there[ref] for ref in call.inputs], [(name, there[ref]) for name, ref in call.named]
        name = f"{scope}{layer.name}"
        try:
            if layer.operation:
                if framed:
                    raise layer.refuse("an operation within a TimeDistributed isn't supported")
                return [*operate(self._of(layer, name), call, there.__getitem__)]
            starts: list[Value] = []
            if layer.kind in RECURRENT:
                starts = [*inputs[1:], *(value for at, value in named if at == "initial_state")]
                inputs, named = inputs[:1], [(at, value) for at, value in named if at != "initial_state"]
            inputs = self._check_call(layer, call, inputs, named, name)
            if layer.model is not None:
                return [*self._inside(layer.model, layer, f"{name}.", inputs, framed)]
            if framed:
                if starts:
                    raise layer.refuse("initial states of a layer within a TimeDistributed aren't supported")
                return self._frames(layer, inputs, name)
            return self._apply(layer, inputs, starts, name, {at for at, _ in named})
        except TooMuchError:
            raise
        except FormatError as error:
            self._problem(str(error))
        except ValueError as error:  # inputs that the node refuses
            self._problem(str(layer.refuse(str(error)[:300])))
        return outputs

    def _inside(self, model: Model, layer: Layer, scope: str, inputs: list[Value], framed: bool) -> list[Value | None]:
        if len(inputs) != len(model.inputs):
            raise layer.refuse(f"expected {len(model.inputs)} tensors, found {len(inputs)}")
        return self._run(model, scope, inputs, framed)

    def _frames(self, layer: Layer, inputs: list[Value], name: str) -> list[Value | Pending | None]:
        """Apply a layer to every step of its input separately."""
        nodes, build = self.built.nodes.get(id(layer), []), self._of(layer, name)
        none = not nodes and layer.kind not in NOTHING  # such as a wrapper of another layer
        if len(inputs) != 1 or none or composer(build, inputs) is not None:
            raise layer.refuse("this layer isn't supported within a TimeDistributed")
        return [at_every_frame(build, nodes, inputs[0])]

    def _of(self, layer: Layer, name: str) -> LayerBuilder:
        return LayerBuilder(self.builder, layer, name, self.dtype, self.followed)

    def _problem(self, text: str) -> None:
        self.builder.refuse(text.removeprefix(f"{self.built.path}: "))

    def _check_call(
        self, layer: Layer, call: LayerCall, inputs: list[Value], named: list[tuple[str, Value]], name: str
    ) -> list[Value]:
        """Return a layer's inputs, with the mask passed to it; raise `FormatError` for an unsupported call."""
        for keyword, value in named:
            if keyword == "reset" and FLAGGED.keys() & {layer.kind}:
                raise layer.refuse("reset as an input of the model isn't supported: use net.run(x, reset=...)")
            if keyword != "mask":
                raise layer.refuse(f"the argument {keyword} from another layer isn't supported")
            if len(inputs) == 1 and value.flag is None and value.wire in self.builder.inputs:
                known = inputs[0].mask == ("given", value.wire)  # Keras 3 also lists a mask that it passes on itself
                inputs = [inputs[0] if known else self._masked(layer, inputs[0], value, name)]
            elif len(inputs) != 1 or value.flag is None or value.flag != _own(inputs[0].mask):
                raise layer.refuse("expected the sequence's own mask or an input as its mask, found another")
        settings = [name for name, value in call.settings if value is not None]
        odd = [name for name in settings if name not in ("training", "mask")]
        masks = (value for name, value in call.settings if name == "mask")
        odd += [
            "mask" for value in masks if any(one is not None for one in (value if isinstance(value, list) else [value]))
        ]
        odd += [short(value) for value in call.others if value is not None]
        if odd:
            raise layer.refuse(f"these arguments of its call aren't supported: {', '.join(odd)}")
        if not inputs:
            raise layer.refuse("expected a tensor, found a call without any")
        if any(value.flag is not None for value in inputs):
            raise layer.refuse("expected numbers, found a mask")
        if layer.model is None and layer.kind not in MANY and len(inputs) != 1:
            raise layer.refuse(f"expected one tensor, found {len(inputs)}")
        return inputs

    def _masked(self, layer: Layer, value: Value, flags: Value, name: str) -> Value:
        """Return a sequence with its mask replaced by an input of the model."""
        build = self._of(layer, f"{name}.masked")
        return build.add(StepMask(), build.bare(value), flags)._replace(mask=("given", flags.wire))

    def _apply(
        self, layer: Layer, inputs: list[Value], starts: list[Value], name: str, keywords: set[str]
    ) -> list[Value | Pending | None]:
        """Apply a layer to `inputs`; `starts` are its initial states, `keywords` the names of its keyword arguments."""
        value = inputs[0]
        if layer.inner is not None:
            inner = layer.inner
            if inner.model is not None:
                return [*self._inside(inner.model, inner, f"{name}.", inputs, True)]
            why = self.built.refused.get(id(inner))
            if why is not None:
                raise FormatError(why)
            return self._frames(inner, inputs, name)
        nodes, build = self.built.nodes[id(layer)], self._of(layer, name)
        passed = None
        if starts and self.major >= 3 and value.mask is not None and "mask" not in keywords and not flagged(layer):
            # Keras 3 ignores the mask of a sequence if states are given, but passes it on to the next layer.
            passed = ("passed", _own(value.mask))
            value = build.bare(value)
        elif any(map(_passed, inputs)) and any(node.heeds_mask for node in nodes):
            raise layer.refuse("takes a mask that Keras ignored in an earlier layer with an initial state")
        if layer.kind == "Softmax" and value.mask is not None:
            raise layer.refuse("a softmax over masked features isn't supported")
        if layer.kind == "GlobalMaxPooling1D" and value.mask is not None:  # Keras ignores the mask here
            value = build.bare(value)
        compose = composer(build, [value, *inputs[1:]])
        if compose is not None:
            return [compose(build, nodes, [value, *inputs[1:]])]
        if not nodes and layer.kind not in (*NOTHING, "InputLayer"):
            raise layer.refuse("expected a layer that computes something")
        masked = value.mask is not None
        for node in nodes:
            values = inputs if node.inputs is None else [value]
            # Keras drops the mask of a cropped sequence; the mask of a Masking replaces the one before.
            taken = [build.bare(value)] if isinstance(node, (Masking, Select)) else values
            mask = self._mask(layer, node, taken, values[0].wire)
            if starts and len(starts) != len(node.state_sizes):
                raise layer.refuse(f"expected {len(node.state_sizes)} initial states, found {len(starts)}")
            begun = [Value(start.start) for start in starts]
            value = build.add(node, *taken, *begun)._replace(mask=mask or passed)
        if layer.kind in RECURRENT:
            return [*returned(build, nodes[0], value, masked)]
        return [value]

    def _mask(self, layer: Layer, node: Node, values: list[Value], wire: str) -> Any:
        """Return the mask of a node's output, its first wire given; raise `FormatError` if Keras's would differ."""
        masks, shape = [_own(value.mask) for value in values], self.builder.shapes[values[0].wire]
        axes, masked = 2 if shape is None else len(shape), any(value.mask is not None for value in values)
        if isinstance(node, Merge) and masked:
            along_time = node.mode == "concat" and node.place(axes) == 1
            if self.major < 3 and (along_time or len(set(masks)) > 1):
                raise layer.refuse("merging sequences with different masks isn't supported for Keras 2")
            if node.mode == "concat":
                masks = [("all",) if mask is None else mask for mask in masks]
        if isinstance(node, Recurrent) and masked and node.go_backwards and node.return_sequences:
            raise layer.refuse("returning a masked sequence backwards isn't supported: Keras doesn't reverse the mask")
        after = node.mask_after(masks, axes, _MaskKeys(node, wire, self.followed))
        return ("passed", after) if after is not None and any(map(_passed, values)) else after


def _first_calls(model: Model) -> dict[str, int]:
    """Return the number of the first call of each nested model, where it isn't 0.

    Some versions of Keras count from 1: for them, building a functional model is its call 0.
    """
    refs = [*model.outputs, *(ref for layer in model.layers for call in layer.calls for ref in call.refs)]
    within = {layer.name for layer in model.layers if layer.model is not None and layer.model.kind != "Sequential"}
    least: dict[str, int] = {}
    for ref in refs:
        if ref.layer in within:
            least[ref.layer] = min(ref.call, least.get(ref.layer, ref.call))
    return {name: number for name, number in least.items() if number == 1}


def _passed(value: Value) -> bool:
    """Return whether a value's mask is one that a layer ignored and passed on; the network has no mask there."""
    return value.mask is not None and value.mask[0] == "passed"


def _own(mask: Any) -> Any:
    """Return a mask without the mark that a layer has ignored it and passed it on."""
    return mask[1] if mask is not None and mask[0] == "passed" else mask


class _MaskKeys:
    """Masks by their definition (see `Value`), as `Node.mask_after` takes them."""

    def __init__(self, node: Node, wire: str, followed: Followed) -> None:
        self.node, self.wire, self.followed = node, wire, followed

    def of_node(self) -> Any:
        if isinstance(self.node, Masking):
            return ("any", ("ne", self.wire, float(self.node.value)))
        return ("ne", self.wire, 0.0)

    def both(self, one: Any, other: Any) -> Any:
        return ("and", one, other)

    def either(self, masks: Sequence[Any]) -> Any:
        return either(list(masks))

    def join(self, masks: Sequence[Any]) -> Any:
        return self.followed.mask(masks)

    def cut(self, mask: Any, taken: slice) -> Any:
        return ("cut", mask, taken.start, taken.stop, taken.step)


def _shape(layer: Layer) -> Shape | None:
    """Return the shape of an input; None if the file doesn't specify it."""
    shape = layer.config.get("batch_shape") or layer.config.get("batch_input_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or not 2 <= len(shape) <= MOST_AXES + 1:
        raise layer.refuse(f"expected an input [B, ...], found {short(shape)}")
    if not all(axis is None or (type(axis) is int and 1 <= axis <= MOST) for axis in shape[1:]):
        raise layer.refuse(f"expected every axis of the input to be a length, found {short(shape)}")
    return tuple(shape[1:])
