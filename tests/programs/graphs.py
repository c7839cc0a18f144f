"""Recurrent parts of networks over graphs. `rows` is the number of graphs, `steps` that of their nodes."""

import torch

from programs.harness import program, skip_init
from programs.needs import NEEDS


def nodes(rows, steps, features):
    """Return values of the nodes of several graphs, and the graph of each node."""
    return torch.randn(rows * steps, features), torch.arange(rows).repeat_interleave(steps)


def rings(rows, steps):
    """Return the edges of graphs in which each node has two neighbours."""
    first = torch.arange(rows * steps)
    second = (first + 1) % steps + first // steps * steps
    return torch.stack([torch.cat([first, second]), torch.cat([second, first])])


@program("PyG: Set2Set", *NEEDS["PyG"], runtime=True)
def set2set():
    from torch_geometric.nn import Set2Set

    return Set2Set(16, 3), lambda rows, steps: nodes(rows, steps, 16)


@program("PyG: JumpingKnowledge", *NEEDS["PyG"])
def jumping_knowledge():
    from torch_geometric.nn import JumpingKnowledge

    module = JumpingKnowledge("lstm", 16, 3)
    return module, lambda rows, steps: ([torch.randn(rows * steps, 16) for _ in range(3)],)


@program("PyG: LSTMAggregation", *NEEDS["PyG"], runtime=True)
def lstm_aggregation():
    from torch_geometric.nn import LSTMAggregation

    return LSTMAggregation(16, 32), lambda rows, steps: nodes(rows, steps, 16)


@program("PyG: GatedGraphConv", *NEEDS["PyG"], runtime=True)
def gated_graph():
    from torch_geometric.nn import GatedGraphConv

    return GatedGraphConv(32, 3), lambda rows, steps: (torch.randn(rows * steps, 32), rings(rows, steps))


@program("PyG: AttentiveFP", *NEEDS["PyG"], served=3, runtime=True)
def attentive_fp():
    from torch_geometric.nn import AttentiveFP

    def call(rows, steps):
        values, graph = nodes(rows, steps, 16)
        edges = rings(rows, steps)
        return values, edges, torch.randn(edges.shape[1], 4), graph

    return AttentiveFP(16, 32, 1, edge_dim=4, num_layers=2, num_timesteps=2), call


@program("PyG temporal: DyGrEncoder", *NEEDS["PyG temporal"], served=2, runtime=True)
def dynamic_graph():
    for package in ("torch_geometric_temporal", "torch_geometric_temporal.nn", "torch_geometric_temporal.nn.recurrent"):
        skip_init(package)
    from torch_geometric_temporal.nn.recurrent.dygrae import DyGrEncoder

    def call(rows, steps):
        edges = rings(rows, steps)
        return torch.randn(rows * steps, 16), edges, torch.rand(edges.shape[1])

    return DyGrEncoder(16, 2, "mean", 32, 1), call
