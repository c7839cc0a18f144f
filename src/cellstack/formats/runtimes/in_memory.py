"""Runs a torch module in memory on a network's inputs, so that `verify` can compare the outputs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cellstack.formats.runtimes.answers import Answers, CannotRunError, Inputs
from cellstack.network import Network
from cellstack.network.layouts import Layout, layout_of, rearranged
from cellstack.nodes.base import Array


def is_module(value: Any) -> bool:
    """Return whether a value is a torch module; torch isn't imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def run_module(net: Network, module: Any, inputs: Inputs, ours: dict[str, Array]) -> Answers:
    """Call a module in evaluation mode, without gradients, and return its outputs, and its states if they are known.

    The tensors that it returns, also in nested tuples, lists and dicts, are matched with the network's outputs in
    order. Inputs are passed, and outputs expected, in the layout of the module that the network was read from; without
    one, a module whose recurrent layers take time before batch gets a transposed x, and its output is transposed back.

    Args:
        net: the network.
        module: the module.
        inputs: arrays by the network's names, which are the module's arguments in order.
        ours: the network's outputs.

    Raises:
        CannotRunError: the module raises an error, or returns too few tensors.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    weights = [one for one in (*module.parameters(), *module.buffers()) if one.is_floating_point()]
    like = {"device": weights[0].device, "dtype": weights[0].dtype} if weights else {}
    layouts = {name: layout_of(net, "inputs", name) for name in inputs}
    arrays = [
        torch.from_numpy(np.array(array if layouts[name] is None else layouts[name].from_network(array)))
        for name, array in inputs.items()
    ]
    given = [one.to(**like) if one.is_floating_point() else one.to(like.get("device", "cpu")) for one in arrays]
    batch, steps = (*next(iter(inputs.values())).shape, 0)[:2]
    notes = [*filter(None, [rearranged(net)])]
    with _evaluated(module), torch.no_grad():
        try:
            with first_axes(module) as seen:
                returned = module(*given)
            turned = not notes and bool(seen) and batch != steps and all(shape == (batch, steps) for shape in seen)
            if turned:
                returned = module(*(one.transpose(0, 1) if one.ndim > 1 else one for one in given))
                notes.append("the module takes time before batch, so x was transposed for it")
        except Exception as error:  # a module may raise anything
            text = " ".join(str(error).split())
            raise CannotRunError(f"the module raised {type(error).__name__}: {text[:300]}") from None
    leaves = tree_leaves(returned)
    found = [one.detach().cpu() for one in leaves if isinstance(one, torch.Tensor)]
    found = [one.float().numpy() if one.dtype == torch.bfloat16 else one.numpy() for one in found]
    states: dict[str, Array] = {}
    if isinstance(module, torch.nn.RNNBase) and len(found) > 1:  # each [layers, B, H]
        after, found = found[1:], found[:1]
        states = {
            f"cell {number} {name}": array[number]
            for name, array in zip(net.cells[0].spec.state_sizes if net.cells else (), after, strict=False)
            for number in range(len(array))
        }
    noted = net.metadata.get("onnx", {}).get("outputs", {})  # of a network of `compile`
    places = [int(name[7:]) for name in noted if re.fullmatch(r"output_\d+", name)]
    if len(places) != len(ours):
        places, noted = list(range(len(ours))), {}
    if max(places) >= len(found):
        raise CannotRunError(f"the module returns {len(found)} tensors, fewer than the network's outputs")
    if len(found) > len(places) and not noted:
        notes.append(f"not compared: {len(found) - len(places)} more tensors that the module returns")
    outputs: dict[str, Array] = {}
    for (name, mine), place, axes in zip(ours.items(), places, noted.values() or [""] * len(ours), strict=True):
        layout = layout_of(net, "outputs", name) or Layout.of(axes)
        theirs = layout.to_network(found[place], batch)
        if turned and mine.ndim > 2 and theirs.shape[:2] == (steps, batch):
            theirs = theirs.swapaxes(0, 1)
        if mine.shape == (*theirs.shape, 1):  # the module squeezes its only feature
            theirs = theirs[..., None]
        outputs[name] = theirs
    return Answers("torch", str(torch.__version__), outputs, states, note="; ".join(notes))


@contextmanager
def _evaluated(module: Any) -> Iterator[None]:
    """Switch a module to evaluation mode, and restore each part's mode."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode


@contextmanager
def watched(parts: Iterable[Any], look: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `look` with each part of a module, and its inputs, before it runs."""
    hooks = [part.register_forward_pre_hook(look) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def first_axes(module: Any) -> Iterator[list[tuple[int, ...]]]:
    """Collect the first two axes of the input of each recurrent layer that takes time before batch."""
    import torch

    seen: list[tuple[int, ...]] = []

    def look(_: Any, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], torch.Tensor) and given[0].ndim == 3:
            seen.append(tuple(given[0].shape[:2]))

    with watched((p for p in module.modules() if isinstance(p, torch.nn.RNNBase) and not p.batch_first), look):
        yield seen
