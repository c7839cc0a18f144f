"""Modules that pack sequences by their lengths, as networks that take lengths or a mask."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cellstack as cs


class Packs(nn.Module):
    """A module that packs its input.

    Args:
        how: returns the lengths and x from the inputs, and what to do with the padded output.
        ends: what it returns of the output, the lengths and the states.
        is_sorted: passed as `enforce_sorted`.
        **options: of the recurrent layer.
    """

    def __init__(self, how, ends=lambda m, y, lengths, h: m.head(y), is_sorted=False, kind=nn.LSTM, **options):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.ends, self.is_sorted = how, ends, is_sorted
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (1 + self.rnn.bidirectional), 2)

    def forward(self, x, *others):
        x, lengths, back = self.how(x, *others)
        y, h = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.is_sorted))
        y, lengths = pad_packed_sequence(y, batch_first=True)
        return self.ends(self, y if back is None else y[back], lengths, h[0] if isinstance(h, tuple) else h)


def by_hand(x, lengths):
    lengths, order = lengths.sort(descending=True)
    return x[order], lengths, order.argsort()


LENGTHS = torch.tensor([5, 2, 4])
MASK = torch.arange(5) < LENGTHS[:, None]
CASES = {
    "lengths": (lambda x, lengths: (x, lengths, None), LENGTHS, {"bidirectional": True, "num_layers": 2}),
    "a list": (lambda x, lengths: (x, lengths.tolist(), None), LENGTHS, {"kind": nn.GRU}),
    "sorted": (
        lambda x, lengths: (x, lengths.cpu().long(), None),
        LENGTHS.sort(descending=True)[0],
        {"is_sorted": True},
    ),
    "sorted by hand": (by_hand, LENGTHS, {"bidirectional": True, "is_sorted": True}),
    "a mask": (lambda x, mask: (x, mask.sum(1), None), MASK, {"kind": nn.RNN}),
    "a mask of padding": (lambda x, pad: (x, (1 - pad).sum(1), None), 1 - MASK.long(), {}),
    "last h": (
        lambda x, lengths: (x, lengths, None),
        LENGTHS,
        {"ends": lambda m, y, lengths, h: m.head(torch.cat((h[-2], h[-1]), 1)), "bidirectional": True},
    ),
    "lengths returned": (
        lambda x, lengths: (x, lengths, None),
        LENGTHS,
        {"ends": lambda m, y, lengths, h: (m.head(y), lengths)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_that_packs_becomes_a_network_that_takes_lengths(case, capfd):
    how, given, options = CASES[case]
    module, x = Packs(how, **options).eval(), torch.randn(3, 5, 3)
    masked = "mask" in case
    with pytest.warns(
        UserWarning, match=f"packs sequences: input 1 is the network's argument {'mask' if masked else 'len'}"
    ):
        net = cs.compile(module, (x, given))
    assert net.inputs == ("input",)
    lengths = np.array([7, 3, 1])  # other lengths and rows
    used = np.arange(7) < lengths[:, None]
    x = torch.randn(3, 7, 3)
    theirs = torch.tensor(lengths)
    if masked:
        theirs = torch.tensor(used if case == "a mask" else 1 - used)
    expected = module(x, theirs)
    expected = (expected[0] if isinstance(expected, tuple) else expected).detach().numpy()
    np.testing.assert_allclose(net(x.numpy(), lengths=lengths), expected, atol=1e-5)
    np.testing.assert_allclose(net(x.numpy(), mask=used), expected, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_lengths_that_follow_from_the_input_are_passed_to_the_network():
    module, x = Packs(lambda x: (x, (x != 0).any(-1).sum(1), None)).eval(), torch.randn(3, 5, 3) * MASK[..., None]
    with pytest.warns(UserWarning, match=r"its lengths follow from its input; pass them .* net\(x, lengths=\.\.\.\)"):
        net = cs.compile(module, x)
    np.testing.assert_allclose(net(x.numpy(), lengths=LENGTHS.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        (lambda m, y, lengths, h: y.mean(1), "with rows of different lengths output 0 differs"),
        (lambda m, y, lengths, h: y.sum(1) / lengths[:, None], "can't do the rest: .* Div '/Div': .*py:"),
    ],
)
def test_what_depends_on_padding_or_lengths_otherwise_is_refused(ends, why):
    module = Packs(lambda x, lengths: (x, lengths, None), ends)
    with pytest.raises(cs.FormatError, match=f"it packs sequences, which a Network does by a mask, but {why}"):
        cs.compile(module, (torch.randn(3, 5, 3), LENGTHS))


def test_two_inputs_with_lengths_of_their_own_are_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Packs(lambda x, lengths: (x, lengths, None))

        def forward(self, x, lengths, y, others):
            return self.one(x, lengths) + self.one(y, others)

    x = torch.randn(3, 5, 3)
    with pytest.raises(cs.FormatError, match="it packs sequences of several lengths"):
        cs.compile(Pair(), (x, LENGTHS, x, torch.tensor([5, 1, 1])))
