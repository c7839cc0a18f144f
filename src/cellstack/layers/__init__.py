"""The torch layers: Keras's recurrent layers as torch modules, on one fused autograd op.

Every layer takes tensors of its weights' dtype and device, tensors of integers, and array-likes, which it converts. It
checks its arguments before it computes anything: `ShapeError` for a wrong rank, width, batch or number of states;
`TypeError` for a wrong dtype (complex, a floating dtype other than the weights', a mask that isn't bool); `ValueError`
for a tensor on another device. Dropout and zoneout follow the module's `train()` and `eval()`, or the argument
`training`.

`layer.losses` has the regularisation terms (`losses(module)` for a whole model). Call `layer.apply_constraints()`
(`apply_constraints(module)` for a whole model) after each step of the optimiser. Under `torch.autocast` a floating
input is converted to the weights' dtype, in which the kernel computes.
"""

from cellstack.cells.errors import check_installed

check_installed("cellstack.layers", "torch", "torch")

from cellstack.cells.base import HiddenState, MatrixState, State
from cellstack.cells.errors import ShapeError
from cellstack.cells.gru import GRUTrace
from cellstack.cells.lstm import Trace
from cellstack.cells.rnn import RNNTrace
from cellstack.layers import cell_classes, layer_classes
from cellstack.layers.base import apply_constraints, losses
from cellstack.layers.bidirectional import Bidirectional
from cellstack.layers.cell_classes import *  # noqa: F403
from cellstack.layers.layer_classes import *  # noqa: F403
from cellstack.layers.mlstm import MLSTM
from cellstack.layers.rnn import RNN
from cellstack.layers.stack import StackedRNNCells
from cellstack.layers.time_distributed import TimeDistributed
from cellstack.layers.truncated import truncated_backward

__all__ = [
    "MLSTM",
    "RNN",
    "Bidirectional",
    "GRUTrace",
    "HiddenState",
    "MatrixState",
    "RNNTrace",
    "ShapeError",
    "StackedRNNCells",
    "State",
    "TimeDistributed",
    "Trace",
    "apply_constraints",
    "losses",
    "truncated_backward",
]
__all__ += cell_classes.__all__
__all__ += layer_classes.__all__


def __dir__() -> list[str]:
    return __all__
