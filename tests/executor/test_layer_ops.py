"""What lies between a layer's products, and packed weights: against transformers' own modules in bfloat16."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from batchllm.executor import fused_layer, whole_layer
from batchllm.executor import model as model_module
from batchllm.executor.layer_ops import NativeOps, TorchOps, ops_for
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.native_linear import NativeGatedLinear, NativeLinear
from batchllm.executor.packed_linear import PackedLinear
from batchllm.executor.parity import _run_flat, check_parity
from tests.executor.tiny_models import COMMON, make_model
from tests.native import needs_kernels

BF16 = torch.bfloat16
OPS = ["torch", pytest.param("native", marks=needs_kernels)]


def ops_of(name: str) -> TorchOps | NativeOps:
    made = TorchOps() if name == "torch" else ops_for(BF16)
    assert isinstance(made, NativeOps) == (name == "native")
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """The same but for the last bit, here and there."""
    torch.testing.assert_close(ours, theirs, rtol=0.009, atol=1e-6)
    assert (ours != theirs).float().mean() < 0.02


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [16, 37, 1024])
def test_norm_is_the_modules(name: str, size: int) -> None:
    norm = LlamaRMSNorm(size, eps=1e-5).to(BF16)
    norm.weight.data = normal(size, seed=1)
    states = normal(7, size)
    assert_close(ops_of(name).norm(states, norm), norm(states))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [16, 40, 128])
def test_heads_are_normed_where_they_lie(name: str, size: int) -> None:
    norm = LlamaRMSNorm(size, eps=1e-6).to(BF16)
    norm.weight.data = normal(size, seed=1)
    joined = normal(9, 5 * size)
    before, heads = joined.clone(), joined.view(9, 5, size)[:, 1:4]
    expected = norm(heads.clone())
    ops_of(name).norm_heads(heads, norm)
    assert_close(heads, expected)
    assert torch.equal(joined[:, :size], before[:, :size]) and torch.equal(
        joined[:, 4 * size :], before[:, 4 * size :]
    )


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [16, 45, 512])
def test_gate_is_silu_times_up(name: str, size: int) -> None:
    joined = normal(9, 2 * size) * 8
    joined[0, 0], joined[0, 1] = -100, 100
    expected = nn.functional.silu(joined[:, :size]) * joined[:, size:]
    assert_close(ops_of(name).gated(joined.clone()), expected)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dim", [32, 40, 128])
def test_rotation_is_transformers(name: str, dim: int) -> None:
    angle = torch.rand(1, 5, dim // 2) * 6
    cos, sin = (torch.cat((table, table), dim=-1).to(BF16) for table in (angle.cos(), angle.sin()))
    joined = normal(5, 4 * dim)  # heads of which the last is none of ours
    states = joined.view(5, 4, dim)[:, :3]
    query = states.transpose(0, 1).unsqueeze(0)
    expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
    turned = ops_of(name).rotate(states, cos, sin)
    # In torch the second product is not rounded before it is added.
    torch.testing.assert_close(turned, expected[0].transpose(0, 1), rtol=2**-6, atol=2**-6)
    if name == "native":
        assert torch.equal(turned, expected[0].transpose(0, 1))
        assert torch.equal(joined.view(5, 4, dim)[:, 3], normal(5, 4 * dim).view(5, 4, dim)[:, 3])


def fill_biases(ours: ModelRunner) -> None:
    """Else they are zeros, and nobody would miss them."""
    for name, parameter in ours.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = normal(*parameter.shape)


def wrong_projection(
    layer: fused_layer.FusedDecoderLayer, hidden: Tensor, _positions: object
) -> tuple[Tensor, ...]:
    states = layer.qkv(hidden).view(len(hidden), -1, layer.head_dim)
    return states[:, : layer.q_size // layer.head_dim], states[:, -2:], states[:, -2:]


def runner(config: type = LlamaConfig, **options: object) -> ModelRunner:
    return prepare_model(make_model(config(**{**COMMON, **options}), 0).to(BF16))


@pytest.fixture(params=["oneDNN", pytest.param("native", marks=needs_kernels)])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose packed weights are used."""
    if request.param == "oneDNN":
        monkeypatch.setattr(model_module, "native_kernels", lambda _dtype: None)
    return str(request.param)


# Rows of k, v, gates that are no multiple of a panel; biases of q, k and v; a tied output projection, norms of heads;
# biases everywhere, of gated products too.
MODELS: list[tuple[type, dict[str, object]]] = [
    (LlamaConfig, {"num_key_value_heads": 1, "intermediate_size": 46}),
    (Qwen2Config, {}),
    (Qwen3Config, {"tie_word_embeddings": True}),
    (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
]


@pytest.mark.parametrize(("config", "options"), MODELS)
def test_packed_weights_give_the_same_numbers_and_come_back(
    config: type, options: dict[str, object], packed: str
) -> None:
    ours = runner(config, **options)
    fill_biases(ours)
    before = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    check_parity(ours)
    assert ours.fused, "the fast layers are what is tested here"
    sequences = [torch.arange(length).numpy() + 3 for length in (33, 21, 5)]
    plain = _run_flat(ours, sequences)
    ours.unfuse()
    assert ours.fuse(packed=True)
    kinds = [type(module).__name__ for module in ours.model.modules()]
    kind, in_layer = {"oneDNN": ("PackedLinear", 4), "native": ("NativeLinear", 3)}[packed]
    gated = packed == "native" and not options.get("mlp_bias")
    assert kinds.count(kind) >= in_layer * COMMON["num_hidden_layers"]
    assert kinds.count("NativeGatedLinear") == gated * COMMON["num_hidden_layers"]
    assert type(ours.model.lm_head).__name__ == ("Linear" if config is Qwen3Config else kind)
    for logits, expected in zip(_run_flat(ours, sequences), plain):
        if packed == "oneDNN":
            assert torch.equal(logits, expected)
        else:
            assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    ours.unfuse()
    after = ours.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@needs_kernels
def test_the_check_packs_straight_from_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layer, "join_linears", None)
    ours = runner()
    check_parity(ours, packed=True)
    assert ours.fused and isinstance(ours.model.model.layers[0].qkv, NativeLinear)


def test_packing_drops_the_plain_weights(packed: str) -> None:
    ours = runner()
    check_parity(ours, packed=True)
    layer = ours.model.model.layers[0].original
    assert layer.self_attn.q_proj.weight.numel() == layer.mlp.up_proj.weight.numel() == 0


@needs_kernels
def test_weights_are_in_memory_once_while_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = prepare_model(make_model(LlamaConfig(**COMMON)).to(torch.bfloat16))
    assert runner.fuse(packed=True)
    kinds = (NativeLinear, NativeGatedLinear)
    packed = [weakref.ref(module.packed) for module in runner.model.modules() if isinstance(module, kinds)]
    left: list[int] = []
    for kind in kinds:
        unpacked = kind.unpacked

        def counting(self: Any, unpacked: Any = unpacked) -> nn.Linear:
            left.append(sum(reference() is not None for reference in packed))
            return unpacked(self)

        monkeypatch.setattr(kind, "unpacked", counting)
    runner.unfuse()
    assert len(left) == len(packed) > 4
    for done, alive in enumerate(left):
        assert alive <= len(packed) - done + 2, "those of one module may go together"


def test_layers_that_fail_the_check_give_their_packed_weights_back(
    packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_layer.WholeLayer, "run", lambda *_arguments: True)  # and does nothing
    monkeypatch.setattr(fused_layer.FusedDecoderLayer, "_project", wrong_projection)
    ours = runner()
    sequences = [torch.arange(length).numpy() + 3 for length in (33, 21, 5)]
    plain = _run_flat(ours, sequences)
    check_parity(ours, packed=True)
    assert not ours.fused and not isinstance(ours.model.model.layers[0].self_attn.q_proj, nn.Linear)
    for logits, expected in zip(_run_flat(ours, sequences), plain):
        assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_where_torch_cannot_pack_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(model_module, "native_kernels", lambda _dtype: None)
    ours = runner()
    check_parity(ours)
    sequences = [torch.arange(length).numpy() + 3 for length in (33, 21, 5)]
    plain = _run_flat(ours, sequences)
    ours.pack()
    assert not any(isinstance(module, PackedLinear) for module in ours.model.modules())
    assert all(map(torch.equal, _run_flat(ours, sequences), plain))
