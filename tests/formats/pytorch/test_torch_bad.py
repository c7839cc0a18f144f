"""Damaged and malicious PyTorch files raise FormatError in bounded time and memory; nothing is run."""

import copy
import io
import os
import pickle
import pickletools
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack.formats import pytorch
from cellstack.formats.pytorch import pickles
from cellstack.formats.pytorch.archive import records

ROW = {"_use_new_zipfile_serialization": False}


def saved(value, **how):
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def zipped(data, **members):
    """A zip in torch's form with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/{name}".replace("__", "/"), content)
    return file.getvalue()


@contextmanager
def at_most(memory):
    """Check that no more than this many bytes are allocated at any time."""
    tracemalloc.start()
    try:
        yield
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < memory


@pytest.fixture
def refused(tmp_path):
    """Check that load and extract refuse a file with this message."""

    def refused(data, match):
        path = tmp_path / "file.pt"
        path.write_bytes(data)
        for read in (pytorch.load, pytorch.extract):
            with pytest.raises(cs.FormatError, match=match) as caught:
                read(str(path))
            assert str(caught.value).startswith(str(path))
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 2000

    return refused


# ── code ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Calls:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


CALLS = {
    "system": (os.system, "(posix|nt).system"),
    "eval": (eval, "builtins.eval"),
    "exec": (exec, "builtins.exec"),
    "import": (__import__, "builtins.__import__"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("case", CALLS)
def test_calls_are_refused_by_name_and_never_made(tmp_path, refused, case, protocol):
    function, name = CALLS[case]
    mark = tmp_path / "it ran"
    text = f"touch '{mark}'" if case == "system" else f"open({str(mark)!r}, 'w')"
    value = {"lstm": nn.LSTM(2, 2).state_dict(), "more": Calls(function, "os" if case == "import" else text)}
    for data in (
        zipped(pickle.dumps(value["more"], protocol)),
        saved(value, pickle_protocol=protocol),
        saved(value, pickle_protocol=protocol, **ROW),
        pickle.dumps({"more": value["more"]}, protocol),
    ):
        refused(data, rf"found '{name}': this file was made to run code; none of it was run")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "subprocess\nPopen",
        "__builtin__\neval",
        "builtins\n__import__",
        "importlib\nimport_module",
        "sys\nmodules",
        "torch\nserialization.os.system",
        "shutil\nrmtree",
        "runpy\nrun_path",
    ],
)
def test_names_that_reach_the_system(refused, name):
    module, name = name.split("\n")
    refused(zipped(f"\x80\x02c{module}\n{name}\n(tR.".encode("latin-1")), f"{name}.*made to run code")
    texts = b"".join(b"\x8c" + bytes((len(text),)) + text.encode() for text in (module, name))
    refused(zipped(b"\x80\x04" + texts + b"\x93)R."), f"{name}.*made to run code")


def test_unknown_harmless_objects_become_placeholders(tmp_path):
    """Custom classes, enums, paths, NumPy scalars: none is imported, and none prevents loading."""
    module = nn.LSTM(2, 3)
    path = tmp_path / "file.ckpt"
    more = {"path": tmp_path, "scalar": np.float64(1.5), "error": KeyError("x"), "set": {1, 2}, "kind": torch.float16}
    torch.save({"state": module.state_dict(), "args": more, "size": torch.Size([1, 2])}, path)
    assert list(pytorch.extract(str(path))) == ["state"]
    assert pickles.read("x", b"\x80\x02c__main__\nModel\n)\x81}b.")[0].kind == "__main__.Model"


def test_a_placeholder_does_nothing_when_used():
    data = b"\x80\x02cthe.module\nThing\nK\x01\x85R}b]aK\x01K\x02s(K\x03K\x04u(K\x05e)R)\x81."
    made, end = pickles.read("x", data)
    assert isinstance(made, pickles.Standin)
    assert end == len(data)


# ── bombs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def counted(opcode, layout, count):
    return b"\x80\x05" + opcode + struct.pack(layout, count) + b"x"


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
BOMBS = {
    "BINBYTES8": (counted(b"\x8e", "<Q", 1 << 62), "expected 4611686018427387904 bytes in a bytes8, but only 1 remain"),
    "BINBYTES": (counted(b"B", "<I", (1 << 32) - 1), "but only 1 remain"),
    "BINUNICODE8": (counted(b"\x8d", "<Q", 1 << 40), "but only 1 remain"),
    "BYTEARRAY8": (counted(b"\x96", "<Q", 1 << 63), "is damaged: .*9223372036854775808"),
    "LONG4": (counted(b"\x8b", "<i", (1 << 31) - 1), "not enough data"),
    "LONG4 below zero": (counted(b"\x8b", "<i", -5), "byte count < 0: -5"),
    "FRAME": (counted(b"\x95", "<Q", 1 << 60), "the pickle is damaged"),
    "a place far off": (b"\x80\x02Nr\xff\xff\xff\xff.", "found no tensor"),
    "an empty stack": (b"\x80\x02R.", "it empties its stack too early"),
    "no mark": (b"\x80\x02Nt.", "it empties its stack too early"),
    "never put aside": (b"\x80\x02h\x07.", "the memo has no entry 7"),
    "no end": (b"\x80\x02N", "exhausted before seeing STOP"),
    "no opcode": (b"\x80\x02\xff", "position 2, opcode .* unknown"),
    "extension": (b"\x80\x02\x82\x01.", "expected an opcode of pickle"),
    "buffer": (b"\x80\x05\x97.", "expected an opcode of pickle"),
    "a name without end": (b"\x80\x02c" + b"a" * 100_000, "no newline found"),
    "text that isn't": (b"\x80\x02X\x01\x00\x00\x00\xff.", "can't decode byte 0xff"),
    "a dict as a key": (b"\x80\x02}}Ns.", "expected a dict's key to be text or a number, found a key of dict"),
    "a huge number as a key": (
        b"\x80\x02}\x8b" + struct.pack("<i", 1000) + b"\x01" * 1000 + b"Ns.",
        "expected a dict's key to be text or a number, found a key of int",
    ),
    "a long tuple as a key": (b"\x80\x02}(" + b"N" * 50 + b"tNs.", "at most 16 parts, found one of 50"),
    "odd pairs": (b"\x80\x02}(Nu.", "expected a dict and pairs for it"),
    "append to a number": (b"\x80\x02K\x01Na.", "expected a list to append to, found int"),
    "call a number": (b"\x80\x02K\x01)R.", "expected something to call, found int"),
    "call with a number": (b"\x80\x02ca\nb\nK\x01R.", "expected the arguments of a call in a tuple, found int"),
    "a name of numbers": (b"\x80\x04K\x01K\x02\x93.", "expected the name of a class as text, found int"),
    "a dict copied again and again": (
        b"\x80\x02ccollections\nOrderedDict\nq\x01]q\x00(" + b"NN\x86" * 200 + b"e" + b"h\x01h\x00\x85R" * 2000 + b".",
        "the pickle copies more items than it has bytes",
    ),
    "a set copied again and again": (
        b"\x80\x02cbuiltins\nset\nq\x01]q\x00(" + b"N" * 2000 + b"e" + b"h\x01h\x00\x85R" * 2000 + b".",
        "the pickle copies more items than it has bytes",
    ),
    "arguments copied again and again": (
        b"\x80\x02ccopy_reg\n__newobj__\nq\x01(ca\nb\n" + b"N" * 2000 + b"tq\x00" + b"h\x01h\x00R" * 2000 + b".",
        "the pickle copies more items than it has bytes",
    ),
    "a long id asked for again and again": (
        b"\x80\x02(X\x06\0\0\0moduleca\nb\n" + b"N" * 100_000 + b"tq\x00" + b"h\x00Q0" * 5000 + b".",
        "found no tensor",
    ),
    "nested deep": (b"\x80\x02" + b"]" * 500 + b"a" * 499 + b".", "objects are nested more than 100 deep"),
    "persistent text": (b"\x80\x02K\x01Q.", "persistent id: expected a storage, found int"),
    "another id": (b"\x80\x02X\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86Q.", "persistent id: expected a storage"),
    "a storage of 2^60": (
        STORAGE[:-1] + b"\x8a\x08" + b"\xff" * 7 + b"\x7ftQ.",
        "expected a storage of 0 to 2\\^60 numbers, found 9223372036854775807",
    ),
    "a storage below zero": (STORAGE + struct.pack("<i", -1) + b"tQ.", "2\\^60 numbers, found -1"),
    "a foreign storage": (STORAGE.replace(b"ctorch", b"cother") + b"\x01\0\0\0tQ.", "found 'other.FloatStorage'"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(refused, case):
    data, message = BOMBS[case]
    data = data if data.startswith(b"\x80") else b"\x80\x02" + data
    start = time.process_time()
    with at_most((1 << 20) + 200 * len(data)):
        refused(zipped(data), message)
    assert time.process_time() - start < 10


MANY = 100_000
NESTED = {
    "tuples": b"]" + b"\x85" * MANY,
    "lists": b"]" * MANY + b"a" * (MANY - 1),
    "dicts": b"}N" * MANY + b"N" + b"s" * MANY,
    "stand-ins": b"cthe.module\nThing\nq\x000" + b"h\x00" * MANY + b"N" + b"\x85R" * MANY,
    "states": b"cthe.module\nThing\nq\x000" + b"h\x00)R" * MANY + b"b" * (MANY - 1),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_hundred_thousand_nested_objects(refused, case):
    """Neither reading nor freeing them overflows the stack."""
    start = time.process_time()
    refused(zipped(b"\x80\x02" + NESTED[case] + b"."), "objects are nested more than 100 deep")
    assert time.process_time() - start < 10


def test_doubling(refused):
    """2^100 lists by way of the memo: each is visited once."""
    body = b"]q\x00" + b"".join(b"h" + bytes((n,)) + b"h" + bytes((n,)) + b"\x86q" + bytes((n + 1,)) for n in range(90))
    start = time.process_time()
    refused(zipped(b"\x80\x02" + body + b"."), "expected weights of recurrent layers.*found no tensor")
    assert time.process_time() - start < 10


def test_a_cycle(refused):
    refused(zipped(b"\x80\x02]q\x00h\x00a."), "expected weights of recurrent layers.*found no tensor")


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def claim(shape, strides, offset=0, count=4, data=bytes(16), name="weight_ih_l0"):
    """A zip with one tensor with this shape and these strides in a storage of four numbers."""

    def whole(number):
        digits = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes((len(digits),)) + digits

    def row(numbers):
        return b"(" + b"".join(map(whole, numbers)) + b"t"

    storage = STORAGE[:-1] + whole(count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + row(shape) + row(strides) + b"\x89}tR"
    key = b"X" + struct.pack("<I", len(name)) + name.encode()
    other = b"X\x0c\0\0\0weight_hh_l0"
    again = tensor.replace(row(shape) + row(strides), row([1, 1]) + row([1, 1])).replace(whole(offset), whole(0), 1)
    return zipped(b"\x80\x02}(" + key + tensor + other + again + b"u.", data__0=data)


CLAIMS = {
    "a shape beyond": (
        claim([5, 1], [1, 1]),
        r"found shape \[5, 1\] and strides \[1, 1\] from 0 on, which reach number 4",
    ),
    "a stride beyond": (claim([2, 2], [3, 1]), "which reach number 4"),
    "an offset beyond": (claim([1, 1], [1, 1], 4), "from 4 on, which reach number 4"),
    "a stride below zero": (
        claim([2, 1], [-1, 1], 3),
        r"expected offset, shape and strides from 0 to 2\^63 - 1, found -1",
    ),
    "an offset below zero": (claim([1, 1], [1, 1], -1), "found -1"),
    "a shape below zero": (claim([-2, 1], [1, 1]), "found -2"),
    "sizes that overflow": (claim([1 << 62, 1 << 62], [1 << 62, 4]), "which reach number"),
    "a size of 2^63": (claim([1 << 63, 1], [0, 1]), "found 9223372036854775808"),
    "a size of 2^900": (claim([1 << 900, 1], [0, 1]), "found a number of 901 bits"),
    "numbers out of nothing": (
        claim([1, 1 << 40], [1, 0]),
        r"a tensor .* doesn't fit into the",
    ),
    "axes": (claim([1] * 70, [1] * 70), "expected at most 64 axes, found 70"),
    "axes and strides": (claim([1, 1], [1]), "expected a shape and a stride for each axis"),
    "a storage too short": (claim([1, 1], [1, 1], data=bytes(15)), "data/0': expected 16 bytes, found 15"),
    "a storage too long": (claim([1, 1], [1, 1], data=bytes(17)), "data/0': expected 16 bytes, found 17"),
    "no storage": (claim([1, 1], [1, 1]).replace(b"data/0", b"data/1"), "data/0': the zip has no such member"),
    "a count of storage that isn't there": (
        claim([1, 1], [1, 1], count=1 << 50),
        "expected 4503599627370496 bytes, found 16",
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_tensors_beyond_their_storage(refused, case):
    data, message = CLAIMS[case]
    with at_most(1 << 20):
        refused(data, message)


def test_too_many_weights_from_one_storage(tmp_path):
    """A thousand layers that share the same megabyte."""
    weight = torch.randn(1024, 256)
    state = {f"{n}.weight_{what}h_l0": weight for n in range(1000) for what in "ih"}
    path = tmp_path / "file.pt"
    path.write_bytes(saved(state))
    with at_most(100 << 20), pytest.raises(cs.FormatError, match="too many tensors share the numbers of storage '0'"):
        pytorch.extract(str(path))


@pytest.mark.long
def test_storages_that_share_their_bytes(tmp_path):
    """A hundred overlapping members of a zip, each a megabyte, for a tensor of one number."""
    numbers = torch.ones(1 << 18)
    state = {f"{n}.weight_{what}h_l0": numbers[:1].view(1, 1) for n in range(50) for what in "ih"}
    file = io.BytesIO(saved({name: torch.ones(1 << 18)[:1].view(1, 1) for name in state}))
    with zipfile.ZipFile(file) as archive:
        data = archive.read("archive/data.pkl")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", numbers.numpy().tobytes())
        for number in range(1, len(state)):
            again = copy.copy(archive.getinfo("archive/data/0"))
            again.filename = f"archive/data/{number}"
            archive.filelist.append(again)
    path = tmp_path / "file.pt"
    path.write_bytes(file.getvalue())
    with at_most(30 << 20), pytest.raises(cs.FormatError, match="too many tensors share the numbers of storage"):
        pytorch.extract(str(path))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated in torch
def test_dtypes_that_are_not_read(refused):
    state = {"weight_ih_l0": torch.ones(4, 1).to(torch.float8_e4m3fn), "weight_hh_l0": torch.ones(4, 1)}
    refused(saved(state), "expected a tensor of float32, .*, found float8_e4m3fn")
    refused(saved({name: torch.ones(4, 1, dtype=torch.complex64) for name in state}), "found complex64")


# ── containers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_paths_outside_the_archive(refused):
    for name in ("../data.pkl", "/etc/data.pkl", "a/../../data.pkl", "a\\data.pkl"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"\x80\x02}.")
        data = file.getvalue()
        refused(data, "the archive has a member with a path outside it")
    key = b"../../etc/passwd"
    data = STORAGE.replace(b"X\x01\0\0\x000", b"X" + struct.pack("<I", len(key)) + key) + b"\x01\0\0\0tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + data + b"K\0K\x01K\x01\x86K\x01K\x01\x86\x89}tR"
    state = b"\x80\x02}(X\x0c\0\0\0weight_ih_l0" + tensor + b"X\x0c\0\0\0weight_hh_l0" + tensor + b"u."
    refused(zipped(state), r"data/\.\./\.\./etc/passwd': the zip has no such member")


def test_zips_of_another_kind(refused):
    def pack(*names, data=b"\x80\x02}.", **how):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", **how) as archive:
            for name in names:
                archive.writestr(name, data)
        return file.getvalue()

    refused(pack("config.json"), "expected one data.pkl as torch.save writes it, found 0 in the zip")
    refused(pack("a/data.pkl", "b/data.pkl"), "found 2 in the zip")
    refused(
        pack("a/data.pkl", data=bytes(100_000), compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted members aren't supported",
    )
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = pack("a/data.pkl", "a/data.pkl")
    refused(twice, "the zip has two members of one name")
    refused(b"PK\x05\x06" + bytes(18), "found 0 in the zip")
    refused(b"PK" + bytes(100), "the zip file is damaged")


def test_a_zip_with_wrong_offsets(refused):
    data = saved({"weight_ih_l0": torch.ones(4, 1), "weight_hh_l0": torch.ones(4, 1)})
    at = data.rindex(b"PK\x01\x02", 0, data.index(b"PK\x01\x02") + 4)  # the first entry of the directory: data.pkl
    refused(
        data[: at + 42] + struct.pack("<I", 7) + data[at + 46 :], "expected a member of the zip at byte 7, found none"
    )
    flipped = bytearray(data)
    flipped[data.index(b"weight_ih_l0")] ^= 1
    refused(bytes(flipped), "the bytes don't match the checksum .*: the file is damaged")


def test_the_oldest_format_is_named(refused):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    refused(
        file.getvalue(),
        "tar files of PyTorch versions before 0.1.10 aren't supported: load it with torch, and save it again",
    )
    assert pytorch.recognises(file.getvalue()[:64])


def test_files_of_other_kinds(refused):
    for data in (b"", b"hello", b"\x89HDF\r\n\x1a\n", b"cos\nsystem\n(S'true'\ntR."):
        refused(data, "expected a file of torch.save, found one that begins with")


def row(*objects):
    """An old file of these objects; only the magic number if there are none."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(value, 2) for value in (*head, *objects)) if objects else pickle.dumps(head[0], 2)


def test_inconsistent_old_files(refused):
    whole = saved({"weight_ih_l0": torch.ones(4, 1), "weight_hh_l0": torch.ones(4, 1)}, **ROW)
    refused(row({}, ["0"]), "storage '0': no tensor uses it, or it occurs twice")
    refused(row({}, 7), "expected the storages' keys, found int")
    refused(row({}), "exhausted before seeing STOP")
    refused(whole.replace(b"M\xe9\x03", b"M\xe8\x03", 1), "expected version 1001 of the old format, found 1000")
    refused(whole[:-1], "the file ends before its numbers")
    doubled = b"\x80\x02]" + b"2\x86" * 10_000 + b"."
    refused(row() + doubled, "expected version 1001 of the old format, found tuple")
    at = len(whole) - 24  # the count before the last storage's four numbers
    refused(whole[:at] + struct.pack("<q", 1 << 62) + whole[at + 8 :], "the file ends before its numbers")
    refused(whole[:at] + struct.pack("<q", -1) + whole[at + 8 :], "the file ends before its numbers")
    refused(whole[:at] + struct.pack("<q", 2) + whole[at + 8 :], "expected 16 bytes, found 8")


def test_inconsistent_storages_within_a_pickle(refused):
    def of(data):
        return b"\x80\x03ctorch.storage\n_load_from_bytes\n" + pickle.dumps(data, 3)[2:-1] + b"\x85q\x00R."

    refused(of("text"), "expected a storage as torch saves it, found str")
    refused(of(b"bytes"), "expected a storage as torch saves it, found bytes")
    nested = of(saved(torch.ones(2).untyped_storage(), **ROW))
    refused(nested, "found 'the whole file': a storage of 8 uint8")
    again = nested[:2] + b"(" + nested[2:-1] + b"ctorch.storage\n_load_from_bytes\nh\x00R" * 50 + b"l."
    refused(again.replace(b"l.", b"t."), "the pickle loads the same storage many times")


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CORPUS = {
    "zip": saved(nn.LSTM(2, 3, 2, bidirectional=True).state_dict()),
    "row": saved(nn.GRU(2, 3).state_dict(), **ROW),
    "module": saved(nn.Sequential(nn.RNN(2, 3), nn.Linear(3, 1))),
    "module in a row": saved(nn.Sequential(nn.RNN(2, 3), nn.Linear(3, 1)), **ROW),
    "pickle": pickle.dumps({"state": nn.LSTM(2, 3).state_dict(), "step": 3}),
}


def attempt(path, data):
    """Read a damaged file; return whether it was refused. Any error but FormatError fails the test."""
    path.write_bytes(data)
    try:
        pytorch.extract(str(path))
    except cs.FormatError:
        return True
    return False


@pytest.mark.parametrize("case", CORPUS)
def test_truncated_anywhere(tmp_path, case):
    data = CORPUS[case]
    for length in range(0, len(data), max(1, len(data) // 400)):
        assert attempt(tmp_path / "file", data[:length]), f"{length} bytes of {len(data)} were taken for a whole file"


@pytest.mark.long
@pytest.mark.parametrize("case", CORPUS)
def test_fuzz(tmp_path, case):
    """Seeded damage of every kind."""
    data, dice, path = CORPUS[case], random.Random(case), tmp_path / "file"
    refusals = 0
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 5, 20))):
            at = dice.randrange(len(broken))
            how = dice.randrange(4)
            if how == 0:
                broken[at] ^= 1 << dice.randrange(8)
            elif how == 1:
                broken[at] = dice.choice(b"\x00\xff\x80().2RQ\x81b]}tuqhX\x8a\x8e")
            elif how == 2:
                del broken[at : at + dice.randrange(1, 9)]
            else:
                broken[at:at] = broken[dice.randrange(len(broken)) :][: dice.randrange(1, 30)]
        start = time.process_time()
        refusals += attempt(path, bytes(broken))
        assert time.process_time() - start < 10
    assert refusals > 50


@pytest.mark.long
def test_fuzzed_pickles():
    """Without a checksum: random bytes after a valid start."""
    data, dice = zipfile.ZipFile(io.BytesIO(CORPUS["module"])).read("archive/data.pkl"), random.Random(7)
    known = [one.code for one in pickletools.opcodes if one.name in {*pickles.OPERATIONS, "STOP"}]
    opcodes = "".join(known).encode("latin-1")
    refusals = 0
    for _ in range(1000):
        cut = dice.randrange(2, len(data))
        noise = bytes(dice.choice(opcodes) if dice.random() < 0.7 else dice.randrange(256) for _ in range(60))
        try:
            pickles.read("the pickle", data[:cut] + noise + data[cut:], persistent=lambda key: key)
        except cs.FormatError as error:
            refusals += "the pickle: " in str(error)
    assert refusals > 250


def test_the_corpus_is_valid(tmp_path):
    for data in CORPUS.values():
        assert not attempt(tmp_path / "file", data)
        with records(str(tmp_path / "file")) as file:
            root = file.read()
            assert root is not None
