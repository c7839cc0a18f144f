"""Tries the routes from a module to a network, and says why none leads there."""

from __future__ import annotations

import re
from typing import Any

from cellstack.capture.axes import axes_in_groups
from cellstack.capture.equality import FLAGS, MUCH_LONGER, Ends, difference
from cellstack.capture.exported import remedy, shortened
from cellstack.capture.nested import fresh
from cellstack.capture.operators import with_checks
from cellstack.capture.packing import (
    is_count,
    packs,
    padded,
    ragged_difference,
    with_flags,
    with_lengths,
    with_zeros,
)
from cellstack.capture.prepared import Prepared
from cellstack.capture.probes import calls_cells_repeatedly, compared_sizes, line_of_call, reads_values
from cellstack.capture.routes import by_onnx
from cellstack.capture.sizes import Places
from cellstack.cells.errors import FormatError
from cellstack.network import Network, layouts

SCALES = (1.0, 0.01, 10.0)  # of the random inputs for the comparison
MORE_SCALES = (*SCALES, -1e-3, 0.1, 0.3, -1.0, 3.0, 30.0, -100.0, 1e3)  # if a module's code depends on values
DRAWS = (
    "a second call with the same input gives another output: it draws random numbers, or keeps a state between calls; "
    "let forward take and return the state, and draw no numbers"
)


def attempt(ready: Prepared, tolerance: float) -> tuple[Network, list[str]]:
    """Return the network of a module, and notes on how it differs from the module, for warnings.

    Raises:
        FormatError: no route leads to a network with the module's outputs; the message gives the reason for each.
    """
    calls = packs(ready.module, ready.inputs)
    if not calls:
        try:
            network, notes = _by_routes(ready, tolerance)
        except FormatError:
            found = _by_lengths(ready, tolerance)
            if found is None:
                raise
            network, notes = found
        return network, [*ready.notes, *notes]
    how = padded(ready.module, ready.inputs, calls)
    if isinstance(how, str):
        raise FormatError(how)
    answers = [value for value in ready.answers if not is_count(value, calls[0].rows)]
    try:
        of_padded = ready._replace(module=how.module, inputs=how.inputs, answers=answers)
        network, notes = _by_routes(of_padded, tolerance)
    except FormatError as error:
        raise FormatError(
            f"it packs sequences, for which a Network uses a mask, but the rest can't be converted: {error}"
        ) from error
    network, note = with_zeros(network), how.note
    why = ragged_difference(network, ready.module, ready.inputs, calls[0], how, tolerance)
    if why is not None:
        network = with_flags(network)
        why = ragged_difference(network, ready.module, ready.inputs, calls[0], how, tolerance)
        note = f"pass {how.source} as flags [B, T] in a second input, True at the used steps: net((x, mask))"
    if why is not None:
        raise FormatError(
            f"it packs sequences, for which a Network uses a mask, but {why}: it may use lengths or padded steps "
            "outside its recurrent layers too, such as for a mean over the used steps; return the sequence, and compute"
            " the mean outside the module"
        )
    if how.kind == "computed" and FLAGS not in network.inputs:
        network.metadata["lengths"] = "computed"
    return network, [*ready.notes, *notes, f"packs sequences: {note}"]


def _by_lengths(ready: Prepared, tolerance: float) -> tuple[Network, list[str]] | None:
    """Return the network of a module that selects steps by the rows' lengths, and notes; None for other modules."""
    found = with_lengths(ready.module, ready.inputs)
    if found is None:
        return None
    how, call = found
    try:
        answers = how.module(*fresh(how.inputs))
        of_padded = ready._replace(module=how.module, inputs=how.inputs, answers=answers)
        network, notes = _by_routes(of_padded, tolerance)
    except Exception:  # not lengths, or the rest can't be read: the caller then reports why it failed without lengths
        return None
    if ragged_difference(network, ready.module, ready.inputs, call, how, tolerance) is not None:
        return None
    return network, [*notes, f"takes lengths: {how.note}"]


def _by_routes(ready: Prepared, tolerance: float) -> tuple[Network, list[str]]:
    """Return the network of the first route whose outputs agree with the module's, and notes for the user."""
    module, inputs = ready.module, ready.inputs
    reasons = [] if ready.again else [DRAWS]
    tried: list[str] = []
    looks: list[str] = []
    for how, exported in (("read directly", False), ("exported to ONNX", True)):
        network = None
        try:
            network = by_onnx(module, inputs, len(ready.answers), looks) if exported else ready.direct
            if isinstance(network, Exception):
                raise network
            why = difference(network, module, inputs, tolerance, MORE_SCALES if looks else SCALES)
        except (TypeError, ValueError, FormatError) as error:
            network, why = None, str(error)
            missing = re.search(r"'(?:aten|prims)(?:::|\.)(\w+)'", why)
            line = line_of_call(module, inputs, missing[1]) if missing else ""
            why += f" ({line})" if line else ""
        if network is not None and why is None and ready.again:
            return network, _notes(network, module, inputs, looks, exported)
        places: list[str] = []
        if network is not None:
            why = why or "its output equals that of the module's first call"
            more, places = _differs(network, module, inputs, why, exported, bool(reasons))
            reasons += more
        if exported:
            if looks and (not places or reads_values(module, inputs)):
                reasons.append(
                    f"it reads values of tensors ({some(looks)}), but a graph only contains what it did for the "
                    "example: write it without if, while, float() and numpy(), for instance by torch.where"
                )
            known = remedy(why or "")
            if known and not reasons:
                reasons.append(known)
            why = shortened(why or "") if reasons else why
        tried.insert(0, f"{how}: {why}")
    raise FormatError("; ".join(reasons + tried))


def _notes(network: Network, module: Any, inputs: tuple[Any, ...], looks: list[str], exported: bool) -> list[str]:
    """Return warnings on code of the module that the network doesn't contain, although the compared outputs agree."""
    notes = [axes] if (axes := layouts.warning(network)) else []
    if not exported:
        return notes
    onnx = network.metadata.setdefault("onnx", {})
    ends = Ends(network, len(inputs))
    if fixed := _fixed_sizes(ends, module, inputs):
        notes.append(f"takes only the example's size along {some(fixed)}, where the module takes others")
    places = compared_sizes(ends, module, inputs)
    places.compared.extend(onnx.get("branches", ()))
    if found := [*places.compared, *places.converted, *([places.failed] if places.failed else [])]:
        onnx["sizes"] = found
    return [*notes, *caveats(module, inputs, looks, places)]


def _fixed_sizes(ends: Ends, module: Any, inputs: tuple[Any, ...]) -> list[str]:
    """Return the axes along which a module takes other sizes than the example's, but its network doesn't."""
    if ends.steps:
        return []
    open_axes = {(n, ends.axis(n, role, inputs[n])) for n in ends.data for role in "BT"}
    places = {place[:2] for group in axes_in_groups(with_checks(module), inputs, []) for place in group}
    return [f"axis {axis} of input {n}" for n, axis in sorted(places - open_axes) if n in ends.data]


def caveats(module: Any, inputs: tuple[Any, ...], looks: list[str], places: Places) -> list[str]:
    """Return warnings on code of a module whose graph only contains what it did for the example."""
    notes, (compared, converted, failed) = list[str](), places
    if looks and reads_values(module, inputs):
        notes.append(
            f"reads values of tensors ({some(looks)}), and the network does what it did for the example: the outputs "
            "agree for the values that were tried, but not all values can be tried"
        )
    if failed:
        notes.append(f"may compare sizes of its input, which can't be checked: {failed}")
    for does, lines in (
        ("compares sizes of its input", compared),
        ("turns sizes of its input into plain numbers, as int(n), range(0, n, 2) or items[n] do", converted),
    ):
        if lines:
            notes.append(
                f"{does} ({some(lines)}), and the network does what it did for the example's sizes: it agrees for "
                "the other sizes that were tried, but may differ for sizes that weren't"
            )
    return notes


def _differs(
    network: Network, module: Any, inputs: tuple[Any, ...], why: str, exported: bool, known: bool
) -> tuple[list[str], list[str]]:
    """Return the likely reasons why a network's outputs differ, and the lines in which the module compares sizes.

    Args:
        network: the network.
        module: the module.
        inputs: the example.
        why: the difference.
        exported: whether the network comes from the module's graph.
        known: whether another reason is known already.
    """
    reasons: list[str] = []
    onnx = network.metadata.get("onnx", {})
    loops = onnx.get("unrolled", {})
    if loops and why.startswith("with more steps"):
        name, (count, what) = next(iter(loops.items()))
        reasons.append(
            f"its loop over {name} {what}, which a Network only supports for a fixed number of steps, "
            f"{count} here: fix the number in forward, or compile a module of one step and stream it"
        )
    other = "has the shape" in why or why.startswith(("with more steps", MUCH_LONGER))
    if other and not known and not reasons and calls_cells_repeatedly(module, inputs):
        reasons.append(
            "its loop skips steps, treats some of them differently, or doesn't join them by "
            "torch.stack(ys, 1): a Network does the same at every step, and returns all steps"
        )
    places: list[str] = []
    converted: list[str] = []
    if exported and why.startswith("with "):
        places, converted, _ = compared_sizes(Ends(network, len(inputs)), module, inputs)
        places = [*places, *onnx.get("branches", ())]
        if places:
            reasons.append(
                f"it compares sizes of its input ({some(places)}), but a graph only contains what it "
                "did for the example's sizes: do the same for all sizes, or compile a module for each case",
            )
    if converted and not known and not reasons:
        reasons.append(
            "its outputs differ for other sizes, perhaps because it turns sizes into plain numbers, as int(n), "
            f"range(0, n, 2) or items[n] do ({some(converted)}): a graph only contains what it did for the example's "
            "sizes"
        )
    return reasons, places


def some(places: list[str]) -> str:
    """Return the first places of a list as text."""
    return ", ".join(places[:3])
