"""Classes of other libraries whose loops can't be recognised from a trace, each with a subclass for the kernel.

These loops write to tensors, take packed sequences, or draw random masks. A subclass here overrides the method with the
loop. Its results are compared with those of the library's class before a module is replaced.
"""

from cellstack.layers.known import deepctr, mingru_pytorch, ncps, speechbrain, xlstm
from cellstack.layers.known.adapter import Adapter as Adapter

ADAPTERS = speechbrain.ADAPTERS | deepctr.ADAPTERS | ncps.ADAPTERS | xlstm.ADAPTERS | mingru_pytorch.ADAPTERS
"""The adapters, by the full names of the classes."""
