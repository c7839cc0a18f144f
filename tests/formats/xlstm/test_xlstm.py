"""Models of the package xlstm as networks, compared with the package, which computes them in PyTorch."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from xlstm import (
    FeedForwardConfig,
    GatedFeedForward,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)

import cellstack as cs
from cellstack.cells.errors import FormatError
from cellstack.formats import xlstm as reader
from cellstack.nodes import GroupedDense, RMSNorm

needs_large = pytest.mark.skipif(sys.version_info < (3, 11), reason="mlstm_kernels needs Python 3.11")
CLOSE = 2e-5  # of the largest output: float32, summed in another order


def shaken(kind, config, seed=0):
    """Return a module whose weights all have values of their own, also those that are initialised as zeros or ones."""
    torch.manual_seed(seed)
    module = kind(config)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight) * max(0.3, float(weight.std())) if weight.numel() > 1 else 0.1)
    return module.eval()


def stack_config(kind=xLSTMBlockStackConfig, dim=16, blocks=3, heads=4, slstm=True, mlstm=True, act="gelu", **more):
    """Return a configuration with an sLSTM as the second block, or with blocks of one kind."""
    own = more.pop("cell", {})
    slstm_block = sLSTMBlockConfig(
        slstm=sLSTMLayerConfig(backend="vanilla", num_heads=heads, **own),
        feedforward=FeedForwardConfig(proj_factor=1.5, act_fn=act),
    )
    mlstm_block = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=heads, qkv_proj_blocksize=4))
    return kind(
        mlstm_block=mlstm_block if mlstm else None,
        slstm_block=slstm_block if slstm else None,
        num_blocks=blocks,
        embedding_dim=dim,
        context_length=32,
        slstm_at=[1] if slstm and mlstm else [],
        **more,
    )


def language_model(seed=0, **settings):
    return shaken(xLSTMLMModel, stack_config(xLSTMLMModelConfig, vocab_size=23, **settings), seed)


def large_model(**settings):
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    config = {"embedding_dim": 64, "num_heads": 4, "num_blocks": 2, "vocab_size": 23, **settings}
    kernels = {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    }
    fixed = {"mode": "inference", "return_last_states": True, "chunk_size": 16, "autocast_kernel_dtype": "float32"}
    return shaken(xLSTMLarge, xLSTMLargeConfig(**{**kernels, **fixed, **config}))


def computed(model, x):
    with torch.no_grad():
        y = model(x)
    return (y[0] if isinstance(y, tuple) else y).numpy()


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * max(1.0, np.abs(want).max()))


def ids(batch=3, steps=17, seed=1):
    return torch.randint(0, 23, (batch, steps), generator=torch.Generator().manual_seed(seed))


STACKS = {
    "both": {},
    "slstm": {"mlstm": False, "blocks": 2},
    "slstm without convolution": {"mlstm": False, "blocks": 1, "cell": {"conv1d_kernel_size": 0}},
    "slstm, longer convolution": {"mlstm": False, "blocks": 1, "cell": {"conv1d_kernel_size": 6}},
    "slstm without a gain": {"mlstm": False, "blocks": 1, "cell": {"group_norm_weight": False}},
    "lstm": {"mlstm": False, "blocks": 1, "cell": {"function": "lstm"}},
    "mlstm": {"slstm": False, "blocks": 2},
    "one head": {"heads": 1, "blocks": 2},
    "wide": {"dim": 48, "blocks": 2},
    "bias": {"bias": True, "blocks": 2},
    "no norm": {"add_post_blocks_norm": False, "blocks": 2},
    **{act: {"mlstm": False, "blocks": 1, "act": act} for act in ("relu", "relu^2", "sigmoid", "swish", "selu")},
}


@pytest.mark.parametrize("name", STACKS)
def test_block_stacks(name):
    model = shaken(xLSTMBlockStack, stack_config(**STACKS[name]))
    x = torch.randn(3, 17, model.config.embedding_dim, generator=torch.Generator().manual_seed(2))
    net = cs.load(model)
    assert_close(net(x.numpy()), computed(model, x))


@pytest.mark.parametrize("seed", range(3))
def test_streams_step_by_step_are_the_sequence(seed):
    """A stream gives the logits of the whole sequence, as xlstm's own `step` does."""
    model = language_model(seed)
    tokens, net = ids(seed=seed), cs.load(model)
    whole = computed(model, tokens)
    stream = net.stream(3)
    steps = np.stack([stream.step(tokens[:, t].numpy()) for t in range(17)], axis=1)
    assert_close(steps, whole)
    assert_close(net(tokens.numpy()), whole)
    state, own = None, []
    with torch.no_grad():
        for t in range(17):
            y, state = model.step(tokens[:, t : t + 1], state)
            own.append(y[:, 0].numpy())
    assert_close(steps, np.stack(own, axis=1))


def test_parts_of_a_model():
    stack = language_model().xlstm_block_stack
    x = torch.randn(2, 9, 16)
    for part in (stack.blocks[0], stack.blocks[1], stack.blocks[0].xlstm, stack.blocks[1].xlstm, stack.blocks[1].ffn):
        assert_close(cs.load(part)(x.numpy()), computed(part, x))
    both = torch.nn.Sequential(torch.nn.Linear(16, 16), stack, torch.nn.Linear(16, 3)).eval()
    assert_close(cs.load(both)(x.numpy()), computed(both, x))


def test_node_names_are_paths_in_the_model():
    net = cs.load(language_model())
    assert {"token_embedding", "blocks.0.xlstm.mlstm", "blocks.1.xlstm.slstm", "lm_head"} <= set(net.names)
    assert sum(isinstance(node, GroupedDense) for node in net.nodes) == 2 * 3 + 4


def test_the_exchanged_names_of_the_gates():
    """`fgate` feeds the input gate: exchanging the two weights changes the output beyond every tolerance."""
    model = shaken(xLSTMBlockStack, stack_config(mlstm=False, blocks=1))
    x = torch.randn(2, 9, 16)
    layer, want = model.blocks[0].xlstm, computed(model, x)
    i, f = layer.igate.weight.data.clone(), layer.fgate.weight.data.clone()
    layer.igate.weight.data, layer.fgate.weight.data = f, i
    assert np.abs(cs.load(model)(x.numpy()) - want).max() > 1000 * CLOSE


def test_weights_of_the_cuda_kernel_have_another_layout():
    model = language_model()
    state = dict(model.state_dict())
    name = "xlstm_block_stack.blocks.1.xlstm.slstm_cell."
    heads, size = 4, 4
    state[name + "_recurrent_kernel_"] = state[name + "_recurrent_kernel_"].transpose(1, 2).contiguous()
    bias = state[name + "_bias_"].reshape(4, heads, size)
    state[name + "_bias_"] = bias.transpose(0, 1).reshape(-1)
    net = reader.network_of(state, "weights")
    assert_close(net(ids().numpy()), computed(model, ids()))


@needs_large
@pytest.mark.parametrize(
    "settings", [{}, {"weight_mode": "fused"}, {"use_bias": True}, {"add_out_norm": False, "num_heads": 2}]
)
def test_the_large_model(settings):
    model = large_model(**settings)
    tokens = ids(2, 32)
    net = cs.load(model)
    assert_close(net(tokens.numpy()), computed(model, tokens))
    assert sum(isinstance(node, RMSNorm) for node in net.nodes) == 4 + model.config.add_out_norm


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dicts(suffix, tmp_path):
    model, path = language_model(), tmp_path / f"model{suffix}"
    torch.save(model.state_dict(), path) if suffix == ".pt" else save_file(model.state_dict(), path)
    net = cs.load(path)
    np.testing.assert_array_equal(net(ids().numpy()), cs.load(model)(ids().numpy()))
    assert "gelu" in net.metadata["assumed"]
    net.save(tmp_path / "native.safetensors")
    again = cs.load(tmp_path / "native.safetensors")
    np.testing.assert_array_equal(again(ids().numpy()), net(ids().numpy()))


LM_CONFIG = {
    "vocab_size": 23,
    "embedding_dim": 16,
    "num_blocks": 3,
    "mlstm_block": {"mlstm": {"num_heads": 4}},
    "slstm_block": {"slstm": {"backend": "vanilla", "num_heads": 4}, "feedforward": {"act_fn": "relu"}},
    "slstm_at": [1],
}


def folder(tmp_path, config, tensors, name="config.yaml", shards=1):
    """Write a checkpoint folder, and return its path."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(config) if name.endswith("json") else yaml.safe_dump(config))
    names = sorted(tensors)
    parts = [{key: tensors[key].contiguous().clone() for key in names[n::shards]} for n in range(shards)]
    if shards == 1:
        save_file(parts[0], tmp_path / "model.safetensors")
    elif name.endswith("json"):
        files = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(shards)]
        where = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        for file, part in zip(files, parts, strict=True):
            save_file(part, tmp_path / file)
    else:
        for n, part in enumerate(parts):
            save_file(part, tmp_path / f"model_{n}.safetensors")
    return tmp_path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_folders(name, shards, tmp_path):
    model = language_model(act="relu")
    net = cs.load(folder(tmp_path, LM_CONFIG, model.state_dict(), name, shards))
    assert_close(net(ids().numpy()), computed(model, ids()))
    assert "assumed" not in net.metadata
    assert net.metadata["config"] == LM_CONFIG
    assert list(cs.extract(tmp_path)) == ["blocks.0.xlstm.mlstm", "blocks.1.xlstm.slstm", "blocks.2.xlstm.mlstm"]


@needs_large
@pytest.mark.parametrize("hf", [False, True])
def test_folders_of_the_large_model(hf, tmp_path):
    model = large_model(gate_soft_cap=5.0, output_logit_soft_cap=2.0, norm_eps=1e-3)
    tensors = model.state_dict()
    config = {"num_heads": 4, "vocab_size": 23, "norm_eps": 1e-3, "gate_soft_cap": 5.0, "output_logit_soft_cap": 2.0}
    if hf:
        tensors = {key.replace("embedding.", "backbone.embeddings."): value for key, value in tensors.items()}
        config |= {"model_type": "xlstm", "hidden_size": 64, "num_hidden_layers": 2}
    else:
        config |= {"embedding_dim": 64, "num_blocks": 2}
    net = cs.load(folder(tmp_path, config, tensors, "config.json" if hf else "config.yaml", 2))
    tokens = ids(2, 32)
    assert_close(net(tokens.numpy()), computed(model, tokens))


@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors"])
def test_matrices_in_bfloat16_stay_so(suffix, tmp_path):
    model = language_model()
    half = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    model.load_state_dict(half)  # rounds its weights, which stay float32
    config = {name: value for name, value in LM_CONFIG.items() if name != "slstm_block"}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(half, path)
    elif suffix:
        save_file(half, path)
    else:
        folder(path, config, half)
    net, wanted = cs.load(path), cs.load(model)
    assert (wanted.weights, net.weights) == ("float32", "bfloat16")
    wanted = wanted.with_weights("bfloat16")
    for own, other in zip(net.nodes, wanted.nodes, strict=True):
        assert getattr(own, "weights", None) == getattr(other, "weights", None)
    assert (net(ids().numpy()) == wanted(ids().numpy())).all()


def changed(**settings):
    return {**LM_CONFIG, **settings}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if not key.endswith(name)}


SLSTM = LM_CONFIG["slstm_block"]
NAME = "xlstm_block_stack.blocks."
INVALID = {
    "missing": (LM_CONFIG, lambda t: without(t, "0.xlstm.k_proj.weight"), "expected a weight '.*k_proj.weight', found"),
    "no head": (LM_CONFIG, lambda t: without(t, "lm_head.weight"), "expected a weight 'lm_head.weight', found none"),
    "extra": (LM_CONFIG, lambda t: {**t, "adapter.weight": torch.ones(2)}, "no place in the model: adapter.weight"),
    "shape": (
        LM_CONFIG,
        lambda t: {**t, NAME + "0.xlstm.learnable_skip": torch.ones(3)},
        r"learnable_skip: expected the shape \[64\], found \[3\]",
    ),
    "kernel": (
        LM_CONFIG,
        lambda t: {**t, NAME + "1.xlstm.slstm_cell._recurrent_kernel_": torch.ones(4, 5, 6)},
        r"_recurrent_kernel_: expected \[4, 16, 4\] or \[4, 4, 16\], found \[4, 5, 6\]",
    ),
    "integers": (
        LM_CONFIG,
        lambda t: {**t, "lm_head.weight": torch.ones(23, 16, dtype=torch.int32)},
        "'lm_head.weight': expected dtype",
    ),
    "activation": (changed(slstm_block={**SLSTM, "feedforward": {"act_fn": "mish"}}), dict, "act_fn: .* found 'mish'"),
    "function": (changed(slstm_block={"slstm": {"function": "gru"}}), dict, "slstm.function: .* found 'gru'"),
    "blocks": (changed(num_blocks=4), dict, "config: num_blocks is 4, and the weights have 3"),
    "width": (changed(embedding_dim=32), dict, "config: embedding_dim is 32, and the weights have 16"),
    "ids": (changed(vocab_size=24), dict, "config: vocab_size is 24, and the weights have 23"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_folders_are_refused(name, tmp_path):
    config, change, message = INVALID[name]
    with pytest.raises(FormatError, match=message):
        cs.load(folder(tmp_path, config, change(language_model(act="relu").state_dict())))


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"expected a folder with config.json or config.yaml, found none"):
        cs.load(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(FormatError, match=r"config.yaml: expected YAML, found"):
        cs.load(tmp_path)
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(FormatError, match="expected settings by name, found list"):
        cs.load(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(FormatError, match=r"expected weights in model.safetensors, .* found none"):
        cs.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(FormatError, match=r"expected names of files in the same folder, found '../other"):
        cs.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    with pytest.raises(FormatError, match=r"the file other.safetensors isn't there"):
        cs.load(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="expected the weights of an xLSTM or a TiRex-2, found a"):
        cs.load(tmp_path)


# ── modules that aren't supported ───────────────────────────────────────────────────────────────────────────────────


def test_hooks_and_unknown_activations_are_refused():
    model = language_model()
    handle = model.xlstm_block_stack.blocks[1].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"xlstm_block_stack.blocks.1.ffn \(GatedFeedForward\): forward hooks aren't"):
        cs.load(model)
    handle.remove()
    half = language_model().to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"expected weights in float32 or float64, got torch.bfloat16"):
        cs.load(half)
    ffn = GatedFeedForward(FeedForwardConfig(embedding_dim=8))
    ffn.config = replace(ffn.config)
    ffn.config.act_fn = "mish"
    with pytest.raises(TypeError, match=r"expected act_fn to be one of gelu, .* found 'mish'"):
        cs.load(ffn)


# ── acceleration ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "cell", "text"),
    [
        ({"mlstm": False}, "slstm_cell", "sLSTM of 16 units, 4 heads: fused cpu kernel"),
        ({"slstm": False}, "mlstm_cell", "mLSTM, 4 heads: fused cpu kernel"),
    ],
)
def test_accelerated_cells(settings, cell, text):
    """In place, in training too: outputs, states and gradients are those of xlstm."""
    model = shaken(xLSTMBlockStack, stack_config(blocks=1, **settings))
    before_class = type(getattr(model.blocks[0].xlstm, cell))
    x = torch.randn(3, 9, 16)
    want = computed(model, x)
    model(x).square().sum().backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    cs.accelerate(model, cells=True)
    assert text in str(cs.plan(model))
    assert_close(computed(model, x), want)
    model(x).square().sum().backward()
    for name, weight in model.named_parameters():
        scale = max(1.0, float(before[name].abs().max()))
        torch.testing.assert_close(weight.grad, before[name], rtol=0, atol=1e-4 * scale, msg=name)
    state, steps = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = model.step(x[:, t : t + 1], state)
            steps.append(y[:, 0].numpy())
    assert_close(np.stack(steps, axis=1), want)
    cs.restore(model)
    assert type(getattr(model.blocks[0].xlstm, cell)) is before_class


@pytest.mark.long
@needs_large
@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"weight_mode": "fused", "mode": "train"}, marks=pytest.mark.slow)]
)
def test_an_accelerated_large_model(settings):
    """Logits, states and gradients are those of xlstm, for a sequence and then step by step."""
    model = large_model(**settings)
    tokens = ids(2, 16)
    with torch.no_grad():
        want, state = model(tokens)
    model(tokens)[0].square().mean().backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    cs.accelerate(model, cells=True)
    assert str(cs.plan(model)).count("mLSTM, 4 heads: fused cpu kernel") == 2
    with torch.no_grad():
        y, after = model(tokens)
    assert_close(y.numpy(), want.numpy())
    for got, own in zip(flat(after), flat(state), strict=True):
        assert got.shape == own.shape
        assert_close(got.numpy(), own.numpy())
    model(tokens)[0].square().mean().backward()
    for name, weight in model.named_parameters():
        scale = max(1.0, float(before[name].abs().max()))
        torch.testing.assert_close(weight.grad, before[name], rtol=0, atol=1e-4 * scale, msg=name)
    with torch.no_grad():
        y, _ = model(tokens, after)
        cs.restore(model)
        want, _ = model(tokens, state)
    assert_close(y.numpy(), want.numpy())


def flat(states):
    return [part for layer in states.values() for part in layer]


@pytest.mark.long
@needs_large
def test_a_large_model_with_sigmoid_input_gates_is_not_accelerated():
    model = large_model(num_blocks=1)
    model.backbone.blocks[0].mlstm_layer.mlstm_backend.config.chunkwise_kernel = "chunkwise--triton_xl_chunk_siging"
    with pytest.raises(ValueError, match="with sigmoid input gates, isn't supported"):
        cs.accelerate(model, cells=True)


@pytest.mark.long
def test_other_functions_of_a_cell_are_not_accelerated():
    model = shaken(xLSTMBlockStack, stack_config(mlstm=False, blocks=1, cell={"function": "lstm"}))
    with pytest.raises(ValueError, match="function='lstm' isn't supported, only 'slstm'"):
        cs.accelerate(model, cells=True)
