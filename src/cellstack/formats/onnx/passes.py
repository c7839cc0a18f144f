"""The passes through which an ONNX file goes before it is read as a network: each takes a model and returns a new one.

A pass changes none of the model's messages, so every earlier model stays valid: where reading a graph as one over time
fails, it is read again, as one step per call, from the model before. `file.read` has already replaced calls of
functions by their nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from cellstack.formats.onnx.decomposed.einsums import expand_einsums
from cellstack.formats.onnx.decomposed.lengths import fix_lengths
from cellstack.formats.onnx.decomposed.loops import roll
from cellstack.formats.onnx.decomposed.norms import expand_norms
from cellstack.formats.onnx.decomposed.products import name_activations
from cellstack.formats.onnx.file import Model, live_nodes, uses
from cellstack.formats.onnx.frames import Frame, frames_of
from cellstack.formats.onnx.specialize import check_specialized, drop_neutral, fix_inputs, specialize

Pass = Callable[[Model], Model]


def passes(
    fixed: Mapping[str, Any],
    sizes: Mapping[str, int],
    contexts: Mapping[str, int],
    whole_loops: bool,
    example: Mapping[str, list[int]] | None = None,
) -> Iterator[Pass]:
    """Yield the passes, in order.

    Args:
        fixed: values of inputs and tensors, by name.
        sizes: sizes of frames, by input.
        contexts: sizes of contexts, by input.
        whole_loops: whether unrolled loops run over all steps of a sequence.
        example: the shape of each input of an example, which chooses the branches that depend on lengths.
    """
    yield lambda model: fix_inputs(model, fixed)  # inputs with a given value become tensors
    yield lambda model: specialize(model, _lengths(model, sizes, contexts))  # each If becomes the branch that runs
    yield fix_lengths  # bounds computed from known lengths become tensors
    if example:
        yield lambda model: specialize(model, example, noted=True)
    yield lambda model: check_specialized(model, example is not None)  # refuses an If that remains
    yield lambda model: drop_neutral(model) if model.given else model  # x + 0 becomes x
    yield expand_einsums  # a product with weights becomes a MatMul
    yield note_unused  # lists tensors that no output depends on, before passes stop using some
    yield lambda model: expand_norms(model, least=2)  # layer normalisation within an unrolled loop
    yield lambda model: roll(model, whole_loops)  # the steps of an unrolled loop become one recurrent operator
    yield name_activations  # products that form an activation become one operator


def note_unused(model: Model) -> Model:
    """Return the model with the tensors that no output depends on listed, except inputs."""
    scope = model.scope()
    taken = uses(scope, live_nodes(scope)).keys() | set(scope.inputs)
    return replace(model, unused=tuple(name for name in scope.initializers if name not in taken))


def _lengths(model: Model, sizes: Mapping[str, int], contexts: Mapping[str, int]) -> dict[str, list[int | None]]:
    """Return the lengths of the inputs' axes, by name, that follow from frames and contexts."""
    asked = [value.name for value in model.graph.input if value.name in {*sizes, *contexts}]
    return {
        name: [frame.size + frame.context if label == "F" else None for label in frame.labels]
        for name, frame in frames_of(model, asked, sizes, contexts).items()
        if isinstance(frame, Frame) and frame.size is not None
    }
