"""Assigns a Keras file's arrays to layers: by names and order up to Keras 2, by positions in the model in Keras 3."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from cellstack.cells.errors import FormatError
from cellstack.formats.keras.cells import RECURRENT, Slot
from cellstack.formats.keras.config import Layer, Model, numbered
from cellstack.formats.keras.files import LEGACY, V3_ROOTS, ModelFile, short
from cellstack.formats.keras.layers import nodes_of, slots
from cellstack.nodes import Node
from cellstack.nodes.base import Array

LEAVES = {"kernel", "recurrent_kernel", "bias", "embeddings", "gamma", "beta", "moving_mean", "moving_variance"}
OLD_LEAF = re.compile(r"(?:^|_)((?:W|U|b)(?:_[ifcozrh])?|gamma|beta|running_mean|running_std)$")

ROUNDED = "8-bit weights are dequantised; the inputs of such a Dense aren't rounded to 8 bits, as Keras rounds them"


class WeightedLayer(NamedTuple):
    """A layer that isn't a model: its name in the network, its path in Keras 3's weights, and the layer around it."""

    layer: Layer
    name: str
    place: str
    top: Layer
    trained: bool


def parts_of(
    model: Model, scope: str = "", place: str = "layers", top: Layer | None = None, trained: bool = True
) -> list[WeightedLayer]:
    """Return every layer of a model and of its nested models, in the file's order."""
    found = []
    layers = [layer for layer in model.layers if not layer.operation]
    for layer, own in zip(layers, numbered([layer.kind for layer in layers]), strict=True):
        name, at, around, below = f"{scope}{layer.name}", f"{place}/{own}", top or layer, trained
        while layer.inner is not None:
            below, layer, name, at = below and layer.flag("trainable", True), layer.inner, name, f"{at}/layer"
        if layer.model is None:
            found.append(WeightedLayer(layer, name, at, around, below))
        else:
            found += parts_of(layer.model, f"{name}.", f"{at}/layers", around, below and layer.flag("trainable", True))
    return found


class Built:
    """The nodes of every layer, or the reason why it has none.

    Attributes:
        nodes: each layer's nodes, by the layer's `id`.
        refused: why a layer isn't supported, by its `id`.
        parts: every layer.
        path: the file, for messages.
    """

    def __init__(self, source: ModelFile, model: Model) -> None:
        self.path, self.parts = source.path, parts_of(model)
        self.nodes: dict[int, list[Node]] = {}
        self.refused: dict[int, str] = {}
        self._source = source
        wanted: dict[int, list[Slot]] = {}
        for part in self.parts:
            self._try(part, lambda part: wanted.update({id(part.layer): self._slots(part)}))
        given = self._by_order(wanted) if source.layout == LEGACY else self._by_place(wanted)
        for part in self.parts:
            arrays = given.get(id(part.layer))
            if arrays is not None and id(part.layer) not in self.refused:
                self._try(part, partial(self._build, arrays))

    def _slots(self, part: WeightedLayer) -> list[Slot]:
        return [slot.below(part.place, part.trained) for slot in slots(part.layer, self._source.major)]

    def _build(self, arrays: list[Array], part: WeightedLayer) -> None:
        source = self._source
        self.nodes[id(part.layer)] = nodes_of(part.layer, iter(arrays), source.major, source.backend)

    def _try(self, part: WeightedLayer, work: Callable[[WeightedLayer], None]) -> None:
        """Call `work` for a layer and record its error, so that the message can name all layers with errors."""
        try:
            work(part)
        except FormatError as error:
            self._refuse(part, error)

    def _refuse(self, part: WeightedLayer, error: FormatError) -> None:
        self.refused.setdefault(id(part.layer), str(error).removeprefix(f"{self._source.path}: "))

    @property
    def recurrent(self) -> list[WeightedLayer]:
        """The recurrent layers."""
        return [part for part in self.parts if part.layer.kind in RECURRENT]

    def _by_place(self, wanted: dict[int, list[Slot]]) -> dict[int, list[Array]]:
        source, given = self._source, {}
        root = next(
            (root for root in V3_ROOTS if any(name.startswith(f"{root}/") for name in source.weights)), "layers"
        )
        for part in self.parts:
            own = f"{part.place}/".replace("layers/", f"{root}/")
            if id(part.layer) not in wanted:
                source.taken.update(name for name in source.weights if name.startswith(own))
                continue
            names = [slot.path.replace("layers/", f"{root}/") for slot in wanted[id(part.layer)]]
            lacking = [name for name in names if name not in source.weights]
            if lacking:
                self._refuse(part, part.layer.refuse(f"expected a weight {short(lacking[0])}, found none"))
            else:
                self._assign(given, wanted, part, names)
        return given

    def _by_order(self, wanted: dict[int, list[Slot]]) -> dict[int, list[Array]]:
        source = self._source
        tops: dict[int, list[WeightedLayer]] = {}
        for part in self.parts:
            tops.setdefault(id(part.top), []).append(part)
        groups = self._groups(
            [parts for parts in tops.values() if any(wanted.get(id(part.layer), True) for part in parts)]
        )
        given: dict[int, list[Array]] = {}
        for parts in tops.values():
            names = source.orders.get(groups.get(id(parts[0].top), ""), [])
            if any(id(part.layer) not in wanted for part in parts):  # it is unknown how many weights each layer has
                source.taken.update(names)
                for part in parts:
                    if part.layer is not parts[0].top and id(part.layer) in wanted and wanted[id(part.layer)]:
                        why = "its weights are stored among those of an unsupported layer"
                        self._refuse(part, part.layer.refuse(why))
                continue
            listed = [(part, slot) for part in parts for slot in wanted[id(part.layer)]]
            if len(listed) != len(names):
                found = (
                    f"expected {len(listed)} weights ({', '.join(slot.leaf for _, slot in listed)}), found {len(names)}"
                )
                self._refuse(parts[0], parts[0].top.refuse(f"{found}, {', '.join(names)}" if names else found))
                source.taken.update(names)
                continue
            where: dict[tuple[int, str], str] = {}
            for (part, slot), name in zip(sorted(listed, key=lambda pair: not pair[1].trainable), names, strict=True):
                where[id(part.layer), slot.path] = name
                if not _fits(name, slot.leaf):
                    self._refuse(part, part.layer.refuse(f"expected its {slot.leaf}, found {short(name)} in its place"))
            for part in parts:
                own = [where[id(part.layer), slot.path] for slot in wanted[id(part.layer)]]
                self._assign(given, wanted, part, own)
        return given

    def _assign(
        self, given: dict[int, list[Array]], wanted: dict[int, list[Slot]], part: WeightedLayer, names: list[str]
    ) -> None:
        """Read the named weights of a layer; a `count` isn't used, and so isn't read."""
        source, slots = self._source, wanted[id(part.layer)]
        source.taken.update(names)
        pairs = [(slot, name) for slot, name in zip(slots, names, strict=True) if slot.leaf != "count"]
        try:
            given[id(part.layer)] = [source.take(name, slot.whole) for slot, name in pairs]
        except FormatError as error:
            self._refuse(part, error)
        if part.layer.kind == "Dense" and any(slot.whole for slot in slots):
            source.assumed = ROUNDED if source.assumed in (None, ROUNDED) else f"{source.assumed}; {ROUNDED}"

    def _groups(self, tops: list[list[WeightedLayer]]) -> dict[int, str]:
        """Return the file's name for each layer that has weights: the same name, or else that at the same position."""
        names = [parts[0].top.name for parts in tops]
        orders = [name for name, weights in self._source.orders.items() if weights]
        if set(names) - set(orders) and not set(names) & set(orders) and len(names) == len(orders):
            names = orders
        return {id(parts[0].top): name for parts, name in zip(tops, names, strict=True)}


def _fits(name: str, leaf: str) -> bool:
    """Return whether a weight's name in the file is compatible with the weight that is expected there."""
    last = name.split("/")[-1].split(":")[0]
    old = OLD_LEAF.search(last)
    if leaf[0] in "WUb" and leaf not in LEAVES:
        return old is None or old[1] == leaf
    last = re.sub(r"_\d+$", "", last)
    return last not in LEAVES or last == leaf
