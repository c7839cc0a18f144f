"""`Network`: a graph of nodes as data, which nodes run together, how it runs, and its description."""

from cellstack.network.network import Network as Network
from cellstack.network.running import processors as processors
