"""Our Keras layers: compared with our torch layers, in functional models, files and training."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch

import cellstack
import cellstack.keras as ours_for_keras
from cellstack import FormatError, ShapeError, layers
from cellstack.layers.cell_base import Masks
from cellstack.layers.stack import run_cells

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's with NumPy 2

FLAGS = {
    "peepholes": ("LSTM", {"peepholes": True, "learn_initial_state": True}),
    "layer norm": ("LSTM", {"layer_norm": True, "norm_epsilon": 1e-3}),
    "projection": ("LSTM", {"proj_size": 3, "cell_clip": 0.5}),
    "coupled": ("LSTM", {"coupled": True, "clip": 2.0, "use_bias": False}),
    "heads": ("LSTM", {"heads": 5, "peepholes": True}),
    "zoneout": ("LSTM", {"zoneout": 0.2, "zoneout_cell": 0.3}),
    "activations": ("LSTM", {"activation": "softsign", "gate_activations": {"o": "hard_sigmoid(0.2, 0.5)"}}),
    "GRU": ("GRU", {"layer_norm": True, "zoneout": 0.2, "learn_initial_state": True}),
    "GRU, reset before": ("GRU", {"reset_after": False, "recurrent_activation": "hard_sigmoid", "clip": 1.0}),
    "SimpleRNN": ("SimpleRNN", {"layer_norm": True, "activation": "relu"}),
    "MinGRU": ("MinGRU", {"layer_norm": True, "learn_initial_state": True}),
    "MinLSTM": ("MinLSTM", {"clip": 2.0}),
    "CfC": ("CfC", {"timespans": True, "clip": 2.0}),
    "CfS": ("CfS", {"timespans": True, "activation": "tanh", "backbone_units": 6, "backbone_layers": 2}),
    "CfC, backbone": ("CfC", {"timespans": True, "backbone_units": 6, "backbone_activation": "tanh"}),
    "LiGRU": ("LiGRU", {"zoneout": 0.2}),
    "SLSTM": ("SLSTM", {"heads": 5}),
    "SLSTM, exponential forget gate": ("SLSTM", {"exponential_forget": True, "use_bias": False}),
}


def pair(name, **flags):
    """A Keras layer and a torch layer with the same random weights."""
    kind, more = FLAGS[name]
    theirs = getattr(ours_for_keras, kind)(5, **more, **flags)
    ours = getattr(layers, kind)(5, **more, **{k: v for k, v in flags.items() if k != "return_gates"}, input_size=4)
    theirs.build((None, None, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    theirs.set_weights([weight.detach() for weight in ours.parameters()])
    return theirs, ours


def flat(values):
    return [torch.as_tensor(value) for value in keras.tree.flatten(values)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", FLAGS)
def test_results_equal_those_of_our_torch_layer(name, backwards):
    theirs, ours = pair(name, return_sequences=True, return_state=True, return_gates=True, go_backwards=backwards)
    assert [w.path.split("/")[-1] for w in theirs.weights] == [n.split(".")[-1] for n, _ in ours.named_parameters()]
    x, mask, reset = torch.randn(3, 7, 4), torch.rand(3, 7) < 0.7, torch.rand(3, 7) < 0.3
    for how in ({}, {"mask": mask}, {"reset": reset}, {"mask": mask, "reset": reset}):
        y = theirs(x, training=False, **how)
        wanted = ours(x, training=False, return_gates=True, **how)
        for a, b in zip(flat(y), flat(wanted), strict=True):
            torch.testing.assert_close(a, b)
        loss, wanted_loss = (sum(part.square().sum() for part in flat(value)) for value in (y, wanted))
        gradients = torch.autograd.grad(loss, [v.value for v in theirs.trainable_variables])
        for a, b in zip(gradients, torch.autograd.grad(wanted_loss, list(ours.parameters())), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_each_head_is_initialised_by_itself():
    for found in (layers.LSTM(12, heads=3, input_size=4), ours_for_keras.LSTM(12, heads=3)):
        if isinstance(found, keras.layers.Layer):
            found.build((None, None, 4))
        heads = [torch.as_tensor(head).detach() for head in found.get_weights()[1]]
        for head in heads:
            torch.testing.assert_close(head @ head.T, torch.eye(4), atol=1e-5, rtol=0)  # orthogonal
        assert not torch.allclose(heads[0], heads[1], atol=0.1)


def test_the_forget_gate_s_bias_is_initialised_as_in_our_torch_layer():
    for kind, flags in (("LSTM", {}), ("SLSTM", {}), ("SLSTM", {"exponential_forget": True})):
        ours, theirs = getattr(layers, kind)(3, **flags, input_size=2), getattr(ours_for_keras, kind)(3, **flags)
        theirs.build((None, None, 2))
        np.testing.assert_array_equal(theirs.get_weights()[-1], ours.get_weights()[-1])


def test_an_initial_state_is_used_and_checked():
    theirs, ours = pair("projection", return_state=True)
    x, state = torch.randn(2, 5, 4), [torch.rand(2, 3), torch.rand(2, 5)]
    for a, b in zip(theirs(x, initial_state=state), ours(x, initial_state=state), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ShapeError, match=r"expected h of state \[B=2, H=3\], got \(2, 5\)"):
        theirs(x, initial_state=state[::-1])


def test_zero_output_for_mask():
    theirs, ours = pair("peepholes", return_sequences=True, zero_output_for_mask=True)
    x, mask = torch.randn(3, 7, 4), torch.rand(3, 7) < 0.5
    torch.testing.assert_close(theirs(x, mask=mask), ours(x, mask=mask))
    theirs, ours = pair("peepholes", zero_output_for_mask=True, go_backwards=True)
    torch.testing.assert_close(theirs(x, mask=mask), ours(x, mask=mask))


def test_training_draws_masks_and_inference_uses_the_rates():
    kind = {"zoneout": 0.3, "zoneout_cell": 0.3, "dropout": 0.4, "recurrent_dropout": 0.4, "return_sequences": True}
    layer = ours_for_keras.LSTM(5, **kind)
    x = torch.randn(3, 7, 4)
    assert torch.equal(layer(x), layer(x, training=False))
    torch.manual_seed(1)
    first = layer(x, training=True)
    assert not torch.equal(layer(x, training=True), first)
    torch.manual_seed(1)
    assert torch.equal(layer(x, training=True), first)
    twins = [
        ours_for_keras.LSTM(5, seed=3, kernel_initializer="ones", recurrent_initializer="ones", **kind)
        for _ in range(2)
    ]
    assert torch.equal(twins[0](x, training=True), twins[1](x, training=True))
    # With the same masks our cell gives the same results.
    torch.manual_seed(1)
    drawn = layer._drawn(x)
    shares = [float((drawn[0] == 0).float().mean()), *(float(mask.mean()) for mask in drawn[2])]
    assert all(0.05 < share < 0.7 for share in shares)
    cell = layers.LSTMCell(5, zoneout=0.3, zoneout_cell=0.3, input_size=4)
    cell.set_weights(layer.get_weights()[: len(list(cell.parameters()))])
    cell.masks = lambda *_: Masks(*drawn)
    wanted = run_cells([cell], x, None, None, None, training=True).y
    torch.testing.assert_close(first, wanted)


@pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16"])
def test_other_dtypes(dtype):
    layer = ours_for_keras.GRU(5, layer_norm=True, dtype=dtype)
    x = torch.randn(3, 7, 4)
    y = layer(x)
    assert y.dtype is {"float64": torch.float64, "mixed_bfloat16": torch.bfloat16}[dtype]
    exact = ours_for_keras.GRU(5, layer_norm=True)
    exact.build(x.shape)
    exact.set_weights(layer.get_weights()[: len(exact.weights)])
    torch.testing.assert_close(y.float(), exact(x), atol=0.05 if "16" in dtype else 1e-6, rtol=0)


def test_a_model_is_trained_saved_and_loaded(tmp_path, rng):
    inputs, starts = keras.Input((6, 4)), keras.Input((6,), dtype="bool")
    hidden = keras.layers.Masking()(inputs)
    options = {"kernel_regularizer": "l2", "bias_constraint": "non_neg", "recurrent_initializer": "glorot_normal"}
    y, h, _c, *gates = ours_for_keras.LSTM(
        5,
        peepholes=True,
        proj_size=3,
        zoneout=0.1,
        return_sequences=True,
        return_state=True,
        return_gates=True,
        **options,
    )(hidden, reset=starts)
    assert [gate.shape for gate in gates] == [(None, 6, 5)] * 5 + [(None, 6, 3)]
    y = keras.layers.Bidirectional(ours_for_keras.GRU(4, layer_norm=True))(y)
    outputs = keras.layers.Dense(2)(keras.layers.Concatenate()([y, h]))
    model = keras.Model([inputs, starts], outputs)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x, reset, wanted = rng.normal(size=(8, 6, 4)), rng.random((8, 6)) < 0.2, rng.normal(size=(8, 2))
    losses = model.fit([x, reset], wanted, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.saving.load_model(path)
    ours = [layer.get_config() for m in (model, again) for layer in m.layers if isinstance(layer, ours_for_keras.LSTM)]
    assert ours[0] == ours[1]
    np.testing.assert_array_equal(again.predict([x, reset], verbose=0), model.predict([x, reset], verbose=0))
    match = r"LSTM 'lstm.*': reset as an input of the model isn't supported"
    with pytest.raises(FormatError, match=match):  # never ignored
        cellstack.load(path)


@pytest.mark.parametrize("name", FLAGS)
def test_a_layer_equals_its_original_after_from_config(name):
    kind, flags = FLAGS[name]
    layer = getattr(ours_for_keras, kind)(
        5, **flags, dropout=0.1, kernel_constraint="max_norm", activity_regularizer="l2"
    )
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    assert again.get_config() == layer.get_config()
    assert again.spec == layer.spec


def test_bad_arguments_are_named():
    for given, error, words in (
        ({"units": 4, "proj_size": 4}, ShapeError, "proj_size"),
        ({"units": 4, "peepholes": 1}, TypeError, "peepholes"),
        ({"units": 4, "dropout": 1.0}, ValueError, "expected dropout in"),
        ({"units": 4, "activation": "gelu"}, ValueError, "gelu"),
        (
            {"units": 4, "activation": keras.activations.gelu},
            ValueError,
            "expected activation to name an activation that the kernel supports",
        ),
        ({"units": 4, "return_gates": "yes"}, TypeError, "return_gates"),
    ):
        with pytest.raises(error, match=words):
            ours_for_keras.LSTM(**given)


@pytest.mark.parametrize("installed", [True, False])
def test_another_backend_is_refused_and_the_setting_explained(installed):
    """Without KERAS_BACKEND, Keras imports TensorFlow."""
    code = "import sys\n"
    if installed:
        code += "from importlib.machinery import ModuleSpec\nfrom types import ModuleType\n"
        code += "keras = sys.modules['keras'] = ModuleType('keras')\nkeras.__spec__ = ModuleSpec('keras', None)\n"
        code += "keras.backend = ModuleType('backend')\nkeras.backend.backend = lambda: 'jax'\n"
    else:
        code += "sys.modules['tensorflow'] = None\n"
    code += "try:\n    import cellstack\n    cellstack.keras.patch()\nexcept ImportError as error:\n    print(error)"
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = "jax" if installed else "tensorflow, which isn't installed"
    fix = "set KERAS_BACKEND=torch before Keras is imported"
    assert done.stdout == f"cellstack.keras needs Keras's torch backend: {fix}; it is set to {found}\n"
