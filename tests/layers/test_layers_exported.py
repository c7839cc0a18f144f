"""Models with our layers, exported by torch: the same numbers, or an error that names an alternative."""

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import tolerances
import torch

from cellstack import layers, load

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's exporters use deprecated functions
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
]
EVERY = {"return_sequences": True, "input_size": 3}
LAYERS = {
    "lstm": lambda: layers.LSTM(4, **EVERY),
    "no bias": lambda: layers.LSTM(4, use_bias=False, **EVERY),
    "last": lambda: layers.LSTM(4, input_size=3),
    "backwards": lambda: layers.LSTM(4, go_backwards=True, **EVERY),
    "gru": lambda: layers.GRU(4, **EVERY),
    "tanh": lambda: layers.SimpleRNN(4, **EVERY),
    "relu": lambda: layers.SimpleRNN(4, "relu", **EVERY),
    "stack": lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(5)], **EVERY),
    "both": lambda: layers.Bidirectional(layers.GRU(4, return_sequences=True), input_size=3),
}


@pytest.fixture(params=LAYERS)
def model(request):
    layer = LAYERS[request.param]()
    width = layer(torch.zeros(1, 2, 3)).shape[-1]
    model = torch.nn.Sequential(layer, torch.nn.Linear(width, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def by_onnxruntime(data, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def close(found, model, x):
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=tolerances.NETWORK, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_older_onnx_exporter(model, batch):
    data = io.BytesIO()
    axes = {"input_names": ["x"], "dynamic_axes": {"x": {1: "T"}}}
    torch.onnx.export(model, (torch.randn(batch, 5, 3),), data, dynamo=False, **axes)
    close(by_onnxruntime(data.getvalue(), x := torch.randn(batch, 9, 3)), model, x)


# "both" has LSTMs and GRUs.
@pytest.mark.long
@pytest.mark.parametrize(
    "model", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "gru"))], indirect=True
)
def test_the_newer_onnx_exporter(model, tmp_path):
    x = torch.randn(2, 5, 3)
    shapes = ({0: torch.export.Dim("B")},)  # torch's nn.LSTM also fixes T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings, which as errors would change its behaviour
        torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False, dynamic_shapes=shapes)
    data = (tmp_path / "net.onnx").read_bytes()
    for other in (x, torch.randn(3, 5, 3)):
        close(by_onnxruntime(data, other), model, other)
    np.testing.assert_allclose(load(tmp_path / "net.onnx")(x.numpy()), by_onnxruntime(data, x), atol=tolerances.NETWORK)


def test_traced_and_exported_programs(model):
    x = torch.randn(2, 5, 3)
    traced = torch.jit.trace(model, (x,))
    program = torch.export.export(model, (x,))
    for run, other in ((traced, torch.randn(2, 9, 3)), (program.module(), torch.randn(2, 5, 3))):
        close(run(other).detach().numpy(), model, other)


OTHERS = {
    "cell": (lambda: layers.LSTM(4, peepholes=True, **EVERY), {}),
    "memory": (lambda: layers.MLSTM(4, heads=2, **EVERY), {}),
    "mask": (lambda: layers.LSTM(4, **EVERY), {"mask": torch.ones(2, 5, dtype=torch.bool)}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_cells_and_calls_without_a_torch_operator_are_refused(name):
    make, given = OTHERS[name]
    layer = make().eval()

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, **given)

    with pytest.raises(TypeError, match=r"load\(model\)\.save\('model\.onnx'\) exports any cell of cellstack"):
        torch.jit.trace(Own(), (torch.randn(2, 5, 3),))
    with pytest.raises(TypeError, match=r"load\(model\)\.save\('model\.onnx'\)"):
        torch.onnx.export(Own(), (torch.randn(2, 5, 3),), io.BytesIO(), dynamo=False)


def test_the_suggested_export_works(tmp_path):
    layer = layers.LSTM(4, peepholes=True, **EVERY)
    load(layer).save(tmp_path / "model.onnx")
    x = torch.randn(2, 5, 3)
    close(by_onnxruntime((tmp_path / "model.onnx").read_bytes(), x), layer, x)


def test_script_is_refused():
    with pytest.raises(
        TypeError, match=r"LSTM: torch\.jit\.script isn't supported: use torch\.jit\.trace or torch\.export"
    ):
        torch.jit.script(torch.nn.Sequential(layers.LSTM(4, **EVERY)))
