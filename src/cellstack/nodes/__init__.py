"""Every node by its name: `from cellstack.nodes import Conv1D`. What a node is: see `node`."""

from cellstack.nodes.base import Array, Node
from cellstack.nodes.dense import Dense
from cellstack.nodes.recurrent import Bidirectional, Cell, Recurrent
from cellstack.nodes.shape import Flatten, Merge, Permute, Repeat, Reshape, Select
from cellstack.nodes.steps import Activation, Embedding, LayerNorm, Masking, Scale, Standardise
from cellstack.nodes.time import Conv1D, GlobalPool, Pool1D

__all__ = [
    "Activation",
    "Array",
    "Bidirectional",
    "Cell",
    "Conv1D",
    "Dense",
    "Embedding",
    "Flatten",
    "GlobalPool",
    "LayerNorm",
    "Masking",
    "Merge",
    "Node",
    "Permute",
    "Pool1D",
    "Recurrent",
    "Repeat",
    "Reshape",
    "Scale",
    "Select",
    "Standardise",
]
