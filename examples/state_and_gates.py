"""Set an LSTM's state, see its effect, and look at its gates.

python examples/state_and_gates.py
"""

import torch

from cellstack import layers

torch.manual_seed(0)
x = torch.randn(1, 6, 3)  # one sequence of six steps, three features

lstm = layers.LSTM(4, return_sequences=True, return_state=True)
from_zeros, *_ = lstm(x)

lstm.states = (torch.full((1, 4), 0.5), torch.full((1, 4), 2.0))  # h, c: for the next call
from_ours, h, c = lstm(x)

print("effect of the state on the output, by step:")
print((from_ours - from_zeros).abs().amax(dim=2)[0].detach().numpy().round(3))

# A sequence cut in two: the second part starts from the final state of the first.
first, *state = lstm(x[:, :4])
second, *_ = lstm(x[:, 4:], initial_state=state)
print("cut in two, bit-identical:", torch.equal(torch.cat([first, second], dim=1), from_zeros))

# The gates of every step, from the same fused pass; a loss can use them like any other output.
y, h, c, trace = lstm(x, return_gates=True)
for name, gate in trace._asdict().items():
    print(f"{name}  unit 0:", gate[0, :, 0].detach().numpy().round(2))
openness = trace.f.mean()
openness.backward()
print("mean forget gate:", round(openness.item(), 3), "- has a gradient:", lstm.cell.bias.grad is not None)
print(lstm.plan())
