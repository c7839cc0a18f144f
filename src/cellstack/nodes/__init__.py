"""All nodes: `from cellstack.nodes import Conv1D`. For their common interface see `base`."""

from cellstack.nodes.along import Merge, Pad, Select
from cellstack.nodes.attention import Attention, TimeSoftmax
from cellstack.nodes.base import Array, Node
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.dense import Dense, GroupedDense
from cellstack.nodes.frames import Context, PerFrame, Skipped
from cellstack.nodes.grid import GridConv, GridPool
from cellstack.nodes.mlstm import MLSTM
from cellstack.nodes.norms import GroupNorm, LayerNorm, RMSNorm
from cellstack.nodes.recurrent import Bidirectional, Recurrent
from cellstack.nodes.reduce import Reduce
from cellstack.nodes.shape import Flatten, Permute, Repeat, RepeatLike, Reshape
from cellstack.nodes.signal import Magnitude, Take
from cellstack.nodes.steps import Activation, Clip, Embedding, Function, Masking, Power, Scale, Standardise, StepMask
from cellstack.nodes.time import Conv1D, GlobalPool, Pool1D

NODES: dict[str, type[Node]] = {
    one.file_type: one
    for _, one in sorted(globals().items())
    if isinstance(one, type) and issubclass(one, Node) and one is not Node
}
"""Every kind of node by its type in files."""

__all__ = [
    "MLSTM",
    "NODES",
    "Activation",
    "Array",
    "Attention",
    "Bidirectional",
    "Cell",
    "Clip",
    "Context",
    "Conv1D",
    "Dense",
    "Embedding",
    "Flatten",
    "Function",
    "GlobalPool",
    "GridConv",
    "GridPool",
    "GroupNorm",
    "GroupedDense",
    "LayerNorm",
    "Magnitude",
    "Masking",
    "Merge",
    "Node",
    "Pad",
    "PerFrame",
    "Permute",
    "Pool1D",
    "Power",
    "RMSNorm",
    "Recurrent",
    "Reduce",
    "Repeat",
    "RepeatLike",
    "Reshape",
    "Scale",
    "Select",
    "Skipped",
    "Standardise",
    "StepMask",
    "Take",
    "TimeSoftmax",
]
