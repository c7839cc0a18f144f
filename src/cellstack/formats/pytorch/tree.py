"""Collects the tensors of a PyTorch file by name, and the modules that contain them.

Checkpoints nest state dicts in any way, and whole modules are pickled as objects with their parameters, buffers and
children in dicts. Both are flattened to names such as `model_state.lstm.weight_ih_l0`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cellstack.cells import KINDS
from cellstack.cells.errors import FormatError
from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.tensors import Quantised, Storage, Tensor, short

DEEPEST = 100  # how deep objects may be nested
LONGEST_NAME = 1000
OWN = ("_parameters", "_buffers", "_modules")  # a module's own dicts
COPIES = ("_flat_weights", "_all_weights", "_flat_weights_names")  # copies of a recurrent module's parameters
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
COMPUTING = re.compile(  # hooks that compute a weight in a way that `derived.py` supports
    r"torch\.nn\.utils\.(weight_norm\.WeightNorm|spectral_norm\.SpectralNorm|prune\.\w+)"
)
PACKED = re.compile(r"__torch__\.torch\.classes\.(rnn\.CellParamsBase|quantized\.LinearPackedParamsBase)")
MANGLED = re.compile(r"___torch_mangle_\d+\.")
HELPERS = ("LinearPackedParams", "PackedParameter", "ModuleList")  # parts of quantised modules that compute nothing
WRAPPERS = ("DataParallel", "DistributedDataParallel")
RECURRENT = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
SCRIPTED = "TorchScript, whose code isn't read: cellstack.compile(torch.jit.load(path), example) runs it"
OUR_CELLS = [f"{kind.title}Cell" for kind in KINDS.values()]
OUR_RNNS = [*(kind.title for kind in KINDS.values()), "RNN"]
OURS = (*OUR_RNNS, *OUR_CELLS, "StackedRNNCells", "Bidirectional", "TimeDistributed")
OUR_PACKAGE = "cellstack.layers."
NOTHING = ("Identity", "Dropout", "Dropout1d", "AlphaDropout")  # modules that do nothing in evaluation mode


@dataclass
class Contents:
    """The contents of a file.

    Attributes:
        tensors: the tensors by name.
        activations: the nonlinearities of plain RNNs, by module name.
        directions: the number of directions of quantised layers, by name.
        axes: the axis that a spectral norm takes as rows, by the weight's name.
        unknown: descriptions of modules that aren't supported.
        roots: the outermost modules, by their path in the file.
        modules: every module whose settings are in the file, by name.
        ours: those of them that are outermost layers of cellstack.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    directions: dict[str, int] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    roots: dict[tuple[str, ...], Standin] = field(default_factory=dict)
    modules: dict[str, Standin] = field(default_factory=dict)
    ours: dict[str, Standin] = field(default_factory=dict)


def within(name: str, module: str) -> bool:
    """Return whether `name` is the name of that module, or of something within it."""
    return not module or name == module or name.startswith(f"{module}.")


def kind_of(value: Standin) -> str:
    """Return the dotted path of an object's class, without TorchScript's additions."""
    return MANGLED.sub("", value.kind.removeprefix("__torch__."))


def attributes_of(value: Standin) -> dict[Any, Any]:
    """Return an object's attributes by name."""
    parts = value.state if isinstance(value.state, tuple) else (value.state,)  # there may be two dicts
    return {key: child for part in parts if isinstance(part, dict) for key, child in part.items()}


def hooked(attributes: dict[Any, Any]) -> bool:
    """Return whether a module has hooks other than those that compute a weight."""
    hooks = [attributes[name] for name in HOOKS if attributes.get(name)]
    return any(
        not isinstance(found, dict)
        or any(not (isinstance(hook, Standin) and COMPUTING.fullmatch(hook.kind)) for hook in found.values())
        for found in hooks
    )


def _computed(attributes: dict[Any, Any]) -> dict[str, int | None]:
    """Return the weights that a module's hooks compute, each with the axis that a spectral norm takes as rows.

    A module that is pickled whole also has them among its attributes, with the values of the last call.
    """
    found: dict[str, int | None] = {}
    for hooks in (attributes.get(name) for name in HOOKS):
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            if isinstance(hook, Standin) and COMPUTING.fullmatch(hook.kind):
                own = attributes_of(hook)
                name, axis = own.get("name", own.get("_tensor_name")), own.get("dim")
                if isinstance(name, str):
                    spectral = hook.kind.endswith(".SpectralNorm") and type(axis) is int
                    found[name] = axis if spectral else None
    return found


def contents(where: str, root: Any) -> Contents:
    """Return the tensors and modules within `root`.

    Args:
        where: the file's name, for messages.
        root: the saved object, as `archive.records` reads it.

    Returns:
        The contents, in the order of the file; an object that occurs twice is visited once.

    Raises:
        FormatError: objects are nested too deeply or have too long names; two tensors have the same name.
    """
    found = Contents()
    seen: set[int] = set()
    waiting: list[tuple[Any, tuple[str, ...]]] = [(root, ())] if _holds(root) else []
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, (Tensor, Quantised)):
            name = ".".join(path)
            if len(name) > LONGEST_NAME:
                raise FormatError(f"{where}: the name {short(name)} is longer than {LONGEST_NAME} characters")
            if found.tensors.setdefault(name, value) is not value:
                raise FormatError(f"{where}: two tensors have the name {short(name, 200)}")
            continue
        if isinstance(value, Storage):  # unknown kinds of tensors, such as sparse ones, are built on storages
            found.unknown.append(
                f"{short('.'.join(path) or 'the whole file', 200)}: a storage of {value.count} {value.dtype}"
            )
            continue
        if id(value) in seen:
            continue
        if len(path) > DEEPEST:
            raise FormatError(f"{where}: objects are nested more than {DEEPEST} deep")
        seen.add(id(value))
        inside = _standin(value, path, found) if isinstance(value, Standin) else _entries(value)
        waiting += [(child, (*path, *names)) for names, child in reversed(inside)]
    return found


def _entries(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Return the elements of a dict or list that may hold tensors, with their names."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    names = ((key if isinstance(key, str) else short(key, 40), child) for key, child in pairs)
    return [((name,), child) for name, child in names if _holds(child)]


def _holds(child: Any) -> bool:
    """Return whether a value may hold tensors."""
    return isinstance(child, (Tensor, Quantised, Storage, dict, list, tuple, Standin))


def _standin(value: Standin, path: tuple[str, ...], found: Contents) -> list[tuple[tuple[str, ...], Any]]:
    """Return the values within an object with their names; if it is a module, record its properties in `found`."""
    packed = _packed(value)
    if packed is not None:
        return packed
    kind, attributes = kind_of(value), attributes_of(value)
    module = kind.rpartition(".")[2]
    ours = kind.startswith(OUR_PACKAGE) and module in OURS
    parts = value.state if isinstance(value.state, tuple) else (value.state,)
    scripted = value.kind.startswith("__torch__.")
    if "_modules" in attributes or scripted:
        outermost = not any(path[: len(root)] == root for root in found.roots)
        if outermost:
            found.roots[path] = value
        name, known = ".".join(path), kind.startswith(("torch.nn.", "torch.ao.nn."))
        dynamic = known and ".dynamic." in kind
        activation = attributes.get("nonlinearity", attributes.get("mode"))  # old modules have the latter alone
        if known and module.startswith("RNN") and isinstance(activation, str):
            word = activation.removeprefix("RNN_").lower()
            if word in ("tanh", "relu"):
                found.activations[name] = word
        if dynamic and isinstance(attributes.get("bidirectional"), bool):
            found.directions[name] = 1 + attributes["bidirectional"]
        if (known or ours) and not scripted:
            found.modules[name] = value
        if ours and not any(within(name, other) for other in found.ours):
            found.ours[name] = value
        plain = module in (*RECURRENT, "Sequential", *WRAPPERS, *NOTHING, *HELPERS)
        plain = ours or (plain and known and (dynamic or ".quantized.modules.rnn" not in kind))
        unread = scripted and outermost
        if not plain or unread or hooked(attributes):
            what = SCRIPTED if unread else "with forward hooks" if plain else "which isn't supported"
            found.unknown.append(f"{short(name or 'the module itself', 200)}: {short(kind, 200)}, {what}")
    if kind.endswith("multiarray._reconstruct"):
        found.unknown.append(f"{short('.'.join(path), 200)}: a NumPy array")
    computed = _computed(attributes)
    for weight, axis in computed.items():
        if axis is not None:
            found.axes[".".join((*path, weight))] = axis
    inside: list[tuple[tuple[str, ...], Any]] = []
    for key, child in attributes.items():
        if key in OWN and isinstance(child, dict):
            inside += _entries(child)
        elif not ours and isinstance(key, str) and key not in (*COPIES, *computed) and _holds(child):
            inside.append(((key,), child))
    for more in (value.items, value.pairs, value.args):
        inside += _entries(more) if more else []
    return inside + [(("state",), part) for part in parts if not isinstance(part, dict) and _holds(part)]


def _packed(value: Standin) -> list[tuple[tuple[str, ...], Any]] | None:
    """Return the packed weights of a quantised module by name; None if `value` isn't a packed object."""
    kind: Any = value.kind
    state: Any = value.state
    if kind == "torch.ScriptObject" and isinstance(state, tuple) and len(state) == 2:
        state, kind = state
    if not isinstance(kind, str):
        return None
    match = PACKED.fullmatch(kind)
    if match is None or not isinstance(state, tuple):
        return None
    if match[1].startswith("quantized"):
        return [((name,), part) for name, part in zip(("weight", "bias"), state, strict=False) if _holds(part)]
    entries: list[tuple[tuple[str, ...], Any]] = []
    _, biases, _, _, packs, *_ = (*(part if isinstance(part, list) else [] for part in state), *([[]] * 5))
    for number, pack in enumerate(packs):
        inside = dict(_packed(pack) or []) if isinstance(pack, Standin) else {}
        which = ("ih", "hh", "hr")[number] if number < 3 else str(number)
        bias = biases[number] if number < len(biases) else inside.get(("bias",))
        entries += [
            ((f"{what}_{which}",), part)
            for what, part in (("weight", inside.get(("weight",))), ("bias", bias))
            if _holds(part)
        ]
    return entries
