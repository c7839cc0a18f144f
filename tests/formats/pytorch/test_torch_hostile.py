"""Damaged and malicious quantised tensors and modules in PyTorch files."""

import io
import random
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from test_torch_bad import STORAGE, refused, saved, zipped
from torch import nn
from torch.ao.quantization import quantize_dynamic

import cellstack as cs
from cellstack.formats import pytorch

__all__ = ["refused"]  # a fixture of both files


def quantised(*meant, kind=b"QInt8Storage"):
    """A zip with a quantised tensor of four numbers, and this quantisation scheme."""
    storage = STORAGE.replace(b"FloatStorage", kind) + b"\x04\0\0\0tQ"
    body = b"ctorch._utils\n_rebuild_qtensor\n(" + storage + b"K\x00K\x04K\x01\x86K\x01K\x01\x86("
    body += b"".join(meant) + b"t\x89}tR"
    return zipped(b"\x80\x02}X\x0c\0\0\0weight_ih_l0" + body + b"s.", data__0=bytes(4))


SCALE, ZERO = b"G" + struct.pack(">d", 0.5), b"K\x00"
MEANINGS = {
    "no scheme": (quantised(), "for each slice of an axis, found 'NoneType'"),
    "no scale": (quantised(b"ctorch\nper_tensor_affine\n"), "found 'per_tensor_affine'"),
    "text": (quantised(b"ctorch\nper_tensor_affine\n", SCALE, b"X\x01\0\0\0a"), "found 'per_tensor_affine'"),
    "a huge zero": (
        quantised(b"ctorch\nper_tensor_affine\n", SCALE, b"\x8a\xff" + b"\x7f" * 255),
        "a zero among its integers, found 0.5 and a number of 2039 bits",
    ),
    "numbers for slices": (quantised(b"ctorch\nper_channel_affine\n", SCALE, ZERO, ZERO), "'per_channel_affine'"),
    "another scheme": (quantised(b"cthe\nscheme\n", SCALE, ZERO), "found 'the.scheme'"),
    "whole numbers of 32 bits": (
        quantised(b"ctorch\nper_tensor_affine\n", SCALE, ZERO, kind=b"QInt32Storage"),
        "expected qint8 or quint8, found qint32",
    ),
    "an infinite scale": (
        quantised(b"ctorch\nper_tensor_affine\n", b"G" + struct.pack(">d", np.inf), ZERO),
        "expected a scale above 0 .* found inf and 0",
    ),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_invalid_quantised_tensors(refused, case):
    refused(*MEANINGS[case])


PACKED = b"c__torch__.torch.classes.rnn\nCellParamsBase\n)\x81"


@pytest.mark.parametrize("state", [b"N", b"K\x01", b")", b"(NNNNNt", b"(X\1\0\0\0a]]](NetNt", b"(]]]]]]]t"])
def test_invalid_packed_weights(refused, state):
    name = b"X\x19\0\0\0_all_weight_values.0.param"
    refused(zipped(b"\x80\x02}" + name + PACKED + state + b"bs."), "expected|damaged")


def test_multiply_nested_modules(refused):
    """2^90 layers by way of the memo."""
    kind = b"ctorch.nn.modules.container\nSequential\n"
    inner = b"ctorch.nn.modules.linear\nLinear\n)\x81}X\x08\0\0\0_modules}sbq\x00"
    body = inner
    for n in range(40):
        held = b"X\x01\0\0\0ah" + bytes((n,)) + b"X\x01\0\0\0bh" + bytes((n,))
        body += kind + b")\x81}X\x08\0\0\0_modules}(" + held + b"usbq" + bytes((n + 1,))
    start = time.process_time()
    refused(zipped(b"\x80\x02" + body + b"."), "the file doesn't specify weight|expected weights of recurrent layers")
    assert time.process_time() - start < 10


def corpus():
    """Files of whole modules, as the members of their zips."""
    normed = nn.utils.weight_norm(nn.LSTM(2, 3), "weight_hh_l0")
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1))
    packed = quantize_dynamic(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 3)), {nn.LSTM, nn.Linear})
    scripted = torch.jit.script(nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU())).save_to_buffer()
    files = [saved(normed), saved(model), saved(packed), saved(packed.state_dict()), scripted]
    archives = [zipfile.ZipFile(io.BytesIO(data)) for data in files]
    return [{name: archive.read(name) for name in archive.namelist()} for archive in archives]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*TypedStorage.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.filterwarnings("ignore:.*batch_first=False:UserWarning")
def test_damaged_pickles(tmp_path):
    """Seeded damage with valid checksums: nothing but a FormatError is raised, and quickly."""
    dice, path, refusals = random.Random(0), tmp_path / "file.pt", 0
    tries = 40
    for members in corpus():
        (name,) = [name for name in members if name.endswith("/data.pkl")]
        for _ in range(tries):
            broken = bytearray(members[name])
            for _ in range(dice.choice((1, 1, 2, 5))):
                at = dice.randrange(len(broken))
                how = dice.randrange(4)
                if how == 0:
                    broken[at] ^= 1 << dice.randrange(8)
                elif how == 1:
                    broken[at] = dice.choice(b"\x00\xff\x80().2RQ\x81b]}tuqhXNK\x88\x89")
                elif how == 2:
                    del broken[at : at + dice.randrange(1, 9)]
                else:
                    broken[at:at] = broken[dice.randrange(len(broken)) :][: dice.randrange(1, 30)]
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, bytes(broken) if member == name else data)
            path.write_bytes(file.getvalue())
            for read in (pytorch.load, pytorch.extract):
                start = time.process_time()
                try:
                    read(str(path))
                except cs.FormatError:
                    refusals += 1
                assert time.process_time() - start < 10
    assert refusals > tries
