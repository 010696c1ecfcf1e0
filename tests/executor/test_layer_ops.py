"""What lies between a layer's products, and packed weights: against transformers' own modules in bfloat16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from batchllm.executor import packed_linear
from batchllm.executor.layer_ops import NativeOps, TorchOps, ops_for
from batchllm.executor.model import ModelRunner, prepare_model
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


def runner(config: type = LlamaConfig, **options: object) -> ModelRunner:
    return prepare_model(make_model(config(**{**COMMON, **options}), 0).to(BF16))


@pytest.fixture(params=["oneDNN", pytest.param("native", marks=needs_kernels)])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose packed weights are used."""
    if request.param == "oneDNN":
        monkeypatch.setattr(packed_linear, "native_kernels", lambda _dtype: None)
    return str(request.param)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_packed_weights_give_the_same_numbers_and_come_back(config: type, packed: str) -> None:
    ours = runner(config, tie_word_embeddings=config is Qwen3Config)
    before = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    check_parity(ours)
    assert ours.fused, "the fast layers are what is tested here"
    sequences = [torch.arange(length).numpy() + 3 for length in (33, 21, 5)]
    plain = _run_flat(ours, sequences)
    ours.pack()
    kinds = [type(module).__name__ for module in ours.model.modules()]
    kind, in_layer = {"oneDNN": ("PackedLinear", 4), "native": ("NativeLinear", 3)}[packed]
    assert kinds.count(kind) >= in_layer * COMMON["num_hidden_layers"]
    assert kinds.count("NativeGatedLinear") == (packed == "native") * COMMON["num_hidden_layers"]
    assert type(ours.model.lm_head).__name__ == ("Linear" if config is Qwen3Config else kind)
    for logits, expected in zip(_run_flat(ours, sequences), plain):
        if packed == "oneDNN":
            assert torch.equal(logits, expected)
        else:
            assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    ours.unfuse()
    after = ours.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_packing_drops_the_plain_weights(packed: str) -> None:
    ours = runner()
    check_parity(ours)
    ours.pack()
    layer = ours.model.model.layers[0].original
    assert layer.self_attn.q_proj.weight.numel() == layer.mlp.up_proj.weight.numel() == 0


def test_where_torch_cannot_pack_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(packed_linear, "native_kernels", lambda _dtype: None)
    ours = runner()
    check_parity(ours)
    sequences = [torch.arange(length).numpy() + 3 for length in (33, 21, 5)]
    plain = _run_flat(ours, sequences)
    ours.pack()
    assert not any(isinstance(module, PackedLinear) for module in ours.model.modules())
    assert all(map(torch.equal, _run_flat(ours, sequences), plain))
