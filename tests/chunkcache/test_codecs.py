"""Codecs: sizes follow from shapes, errors stay within what the format allows, nothing surprises them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.chunkcache.codecs import CODEC_NAMES, Kind, bytes_per_token, codec_named, encode
from batchllm.chunkcache.precompute import decode_layer, encode_layer

KINDS: tuple[Kind, ...] = ("key", "value")
shapes = st.tuples(st.integers(1, 150), st.integers(1, 3), st.sampled_from([2, 8, 32, 80, 128, 192, 256]))


def error(name: str, states: torch.Tensor, kind: Kind) -> float:
    """Relative, root of mean square."""
    back = encode(codec_named(name, torch.float32), states, kind).decode(torch.float32)
    return float((back - states).norm() / states.norm())


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(CODEC_NAMES), st.sampled_from(KINDS), st.integers(0, 5))
def test_shapes_sizes_and_errors(shape: tuple[int, int, int], name: str, kind: Kind, seed: int):
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    codec = codec_named(name, torch.float32)
    encoded = encode(codec, states, kind)
    assert encoded.data.dtype == torch.uint8
    assert encoded.data.numel() == codec.num_bytes(*shape, kind)
    assert encoded.data.numel() % 16 == 0
    back = encoded.decode(torch.float32)
    assert back.shape == shape and bool(torch.isfinite(back).all())
    largest = float(states.abs().max())
    allowed = {"raw": 0.0, "bf16": 2**-8, "fp8": 2**-4, "int8": 1 / 127, "int4": 1 / 7}[name]
    assert float((back - states).abs().max()) <= allowed * largest


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_normal_numbers(kind: Kind):
    states = torch.randn(256, 4, 64, generator=torch.Generator().manual_seed(0))
    assert error("raw", states, kind) == 0
    assert error("bf16", states, kind) < 0.002
    assert error("int8", states, kind) < 0.008
    assert error("fp8", states, kind) < 0.03
    assert error("int4", states, kind) < 0.09


def test_keys_are_scaled_by_channel():
    """A channel that is large in every token, as K has them, costs the others nothing."""
    states = torch.randn(128, 2, 32, generator=torch.Generator().manual_seed(1))
    small = states.clone()
    states[:, :, 5] *= 100
    for name in ("int8", "int4"):
        back = encode(codec_named(name, torch.float32), states, "key").decode(torch.float32)
        others = [channel for channel in range(32) if channel != 5]
        found = float((back - small)[..., others].norm() / small[..., others].norm())
        assert found < 1.05 * error(name, small, "key")
        assert error(name, states, "key") < 0.1


def test_outliers_are_kept_apart():
    """Without the outliers, one value of 50 in a group of normal ones would leave steps of more than 3."""
    states = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(2))
    states[torch.arange(64), 0, torch.arange(64)] = 50.0
    for kind in KINDS:
        back = encode(codec_named("int4", torch.float32), states, kind).decode(torch.float32)
        assert float((back - states).abs().max()) < 0.6
        assert torch.equal(back[torch.arange(64), 0, torch.arange(64)], torch.full((64,), 50.0))


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("value", [0.0, 3.5, -1e-12, 3e4])
def test_constant_states(name: str, value: float):
    states = torch.full((7, 2, 8), value)
    for kind in KINDS:
        back = encode(codec_named(name, torch.float32), states, kind).decode(torch.float32)
        torch.testing.assert_close(back, states, rtol=4e-3, atol=1e-7)


def test_raw_is_exact_in_every_number_format():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        states = torch.randn(9, 2, 8).to(dtype)
        assert torch.equal(encode(codec_named("raw", dtype), states, "key").decode(dtype), states)


def test_bytes_per_token_are_ordered():
    sizes = [bytes_per_token(codec_named(name, torch.float32), 8, 128, 128) for name in CODEC_NAMES]
    assert sizes[0] == 8192 and sizes[1] == 4096
    assert 2048 < sizes[2] < sizes[3] < 2112  # fp8, int8
    assert 1200 < sizes[4] < 1260


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_layer_is_keys_then_values(name: str):
    """Also where V is narrower than K, as in multi-head latent attention."""
    key, value = torch.randn(21, 2, 24), torch.randn(21, 2, 16)
    codec = codec_named(name, torch.float32)
    layer = encode_layer(codec, key, value)
    assert (layer.heads, layer.key_dim, layer.value_dim) == (2, 24, 16)
    back = decode_layer(codec, layer, 21, torch.float32)
    for one, other in zip(back, (key, value)):
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) < 0.1
