"""Modules that pack sequences by their lengths, as networks that take lengths or a mask."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cellstack as cs
from cellstack.capture import compile_network


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


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_module_that_packs_becomes_a_network_that_takes_lengths(case, capfd):
    how, given, options = CASES[case]
    module, x = Packs(how, **options).eval(), torch.randn(3, 5, 3)
    masked = "mask" in case
    with pytest.warns(UserWarning, match=f"packs sequences: pass input 1 as {'mask' if masked else 'lengths'}: net"):
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


@pytest.mark.long
def test_lengths_that_follow_from_the_input_are_passed_to_the_network():
    module, x = Packs(lambda x: (x, (x != 0).any(-1).sum(1), None)).eval(), torch.randn(3, 5, 3) * MASK[..., None]
    with pytest.warns(UserWarning, match=r"pass the lengths, which it computes, .* net\(x, lengths=\.\.\.\)"):
        net = cs.compile(module, x)
    np.testing.assert_allclose(net(x.numpy(), lengths=LENGTHS.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.long
def test_a_network_whose_module_computes_lengths_needs_them(tmp_path):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 3)
            self.rest = Packs(lambda x, lengths: (x, lengths, None), bidirectional=True)

        def forward(self, ids):
            return self.rest(self.table(ids), (ids != 0).sum(1))

    module, ids = Tokens().eval(), torch.tensor([[3, 4, 5, 2], [1, 0, 0, 0]])
    with pytest.warns(UserWarning, match="pass the lengths, which it computes"):
        net = cs.compile(module, ids)
    net.save(tmp_path / "net.safetensors")
    for one in (net, cs.load(tmp_path / "net.safetensors"), net.edit([])):
        for call in (one, one.run, one.trace):
            with pytest.raises(ValueError, match=r"expected lengths, or a mask: the module .* computed"):
                call(ids.numpy())
        expected = module(ids).detach().numpy()
        np.testing.assert_allclose(one(ids.numpy(), lengths=[4, 1]), expected, atol=1e-5)
        np.testing.assert_allclose(one.predict([ids[0, :4], ids[1, :1]])[1], expected[1, :1], atol=1e-5)
        np.testing.assert_allclose(one.unpadded(ids[:1].numpy()), expected[:1], atol=1e-5)
    assert "compare net(x, lengths=...)" in cs.verify(net, module).verdict()
    assert cs.verify(net, tmp_path / "net.safetensors", streams=False).ok()


@pytest.mark.long
def test_a_convolution_before_the_packing_makes_the_lengths_an_input_of_flags():
    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3, padding=1)
            self.rest = Packs(lambda x, lengths: (x, lengths, None), bidirectional=True)

        def forward(self, x, lengths):
            return self.rest(self.conv(x.transpose(1, 2)).transpose(1, 2), lengths)

    module, x = Front().eval(), torch.randn(3, 5, 3)
    with pytest.warns(UserWarning, match=r"pass input 1 as flags \[B, T\] in a second input, .*: net\(\(x, mask\)\)"):
        net = cs.compile(module, (x, LENGTHS))
    assert net.inputs == ("input", "mask")
    np.testing.assert_allclose(net((x.numpy(), MASK.numpy())), module(x, LENGTHS).detach().numpy(), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ends", "why"),
    [
        (lambda m, y, lengths, h: y.mean(1), "with rows of different lengths output 0 differs"),
        (lambda m, y, lengths, h: y.sum(1) / lengths[:, None], "the rest can't be converted: .* Div '/Div': .*py:"),
    ],
)
def test_what_depends_on_padding_or_lengths_otherwise_is_refused(ends, why):
    module = Packs(lambda x, lengths: (x, lengths, None), ends)
    with pytest.raises(cs.FormatError, match=f"it packs sequences, for which a Network uses a mask, but {why}"):
        compile_network(module, (torch.randn(3, 5, 3), LENGTHS))


def test_two_inputs_with_lengths_of_their_own_are_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Packs(lambda x, lengths: (x, lengths, None))

        def forward(self, x, lengths, y, others):
            return self.one(x, lengths) + self.one(y, others)

    x = torch.randn(3, 5, 3)
    with pytest.raises(cs.FormatError, match="it packs the same rows by several lengths"):
        compile_network(Pair(), (x, LENGTHS, x, torch.tensor([5, 1, 1])))


class LastStep(nn.Module):
    """A module that selects a step of each row by its length, without packing."""

    def __init__(self, how, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.how = nn.GRU(3, 4, batch_first=True, **options), how
        self.head = nn.Linear(4 * (1 + self.rnn.bidirectional), 2)

    def forward(self, x, lengths):
        return self.head(self.how(self.rnn(x)[0], lengths))


def gathered(y, lengths):
    index = (lengths - 1).view(-1, 1, 1).expand(-1, -1, y.shape[-1])
    return torch.gather(y, dim=1, index=index).squeeze(1)


def indexed(y, lengths):
    return y[torch.arange(len(y)), lengths.long() - 1]


@pytest.mark.long
@pytest.mark.parametrize("how", [gathered, indexed])
def test_a_module_that_selects_the_last_step_by_lengths_becomes_a_network_that_takes_lengths(how):
    module = LastStep(how).eval()
    with pytest.warns(UserWarning, match="takes lengths: pass input 1 as lengths: net"):
        net = cs.compile(module, (torch.randn(3, 5, 3), LENGTHS))
    x, lengths = torch.randn(4, 8, 3), torch.tensor([3, 8, 1, 5])
    np.testing.assert_allclose(net(x.numpy(), lengths=lengths.numpy()), module(x, lengths).detach().numpy(), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "options"),
    [
        (indexed, {"bidirectional": True}),  # the backward direction starts with the padding
        (lambda y, lengths: y[torch.arange(len(y)), lengths - 2], {}),
        (lambda y, lengths: y[torch.arange(len(y)).flip(0), lengths - 1], {}),
        (lambda y, lengths: y[torch.arange(len(y)), lengths - 1] + y.mean(1), {}),
    ],
)
def test_other_uses_of_lengths_are_refused(how, options):
    with pytest.raises(cs.FormatError, match=r"LastStep can't be a Network: .*input_1"):
        compile_network(LastStep(how, **options), (torch.randn(3, 5, 3), LENGTHS))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:compile. LSTM packs sequences")
def test_packed_sequences_count_as_padded_ones_with_their_lengths():
    module = nn.LSTM(3, 4, bidirectional=True)
    x = torch.randn(3, 5, 3)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    with pytest.warns(UserWarning, match="takes a packed sequence, which counts as two inputs"):
        net = cs.compile(module, packed)
    expected = pad_packed_sequence(module(packed)[0], batch_first=True)[0].detach().numpy()
    np.testing.assert_allclose(net(x.numpy(), lengths=LENGTHS.numpy()), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:compile. Nested")
def test_packed_sequences_may_be_nested_and_keep_other_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, batch):
            return self.rnn(batch["x"], batch["h"])[0]

    module, x, h = Nested(), torch.randn(3, 5, 3), torch.randn(1, 3, 4)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    net = cs.compile(module, {"x": packed, "h": h})
    expected = pad_packed_sequence(module({"x": packed, "h": h}), batch_first=True)[0].detach().numpy()
    ours = net.run(x.numpy(), [h[0].numpy()], lengths=LENGTHS.numpy())[0]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.long
def test_other_values_of_integers_are_compared_too():
    module = LastStep(lambda y, lengths: y * (2 if int(lengths.max()) > 3 else 1)).eval()
    with pytest.raises(cs.FormatError, match=r"reads values of tensors .*: output 0 differs"):
        compile_network(module, (torch.randn(3, 5, 3), LENGTHS))
