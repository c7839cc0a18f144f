"""Every node by its name: `from cellstack.nodes import Conv1D`. What a node is: see `node`."""

from cellstack.dense import Dense
from cellstack.node import Array, Node
from cellstack.nodes_shape import Flatten, Merge, Permute, Repeat, Reshape, Select
from cellstack.nodes_steps import Activation, Embedding, LayerNorm, Masking, Scale, Standardise
from cellstack.nodes_time import Conv1D, Pool, Pool1D
from cellstack.recurrent import Bidirectional, Cell, Recurrent

__all__ = [
    "Activation",
    "Array",
    "Bidirectional",
    "Cell",
    "Conv1D",
    "Dense",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "Masking",
    "Merge",
    "Node",
    "Permute",
    "Pool",
    "Pool1D",
    "Recurrent",
    "Repeat",
    "Reshape",
    "Scale",
    "Select",
    "Standardise",
]
