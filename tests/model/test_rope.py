"""Positions against a loop, wavelengths and rotation against Hugging Face and against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig as HuggingFaceConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from muse_lightning.model import RopeScaling, load_preset
from muse_lightning.model.hf import config_to_hf
from muse_lightning.model.rope import apply_rotary, document_positions, inverse_wavelengths, rotation
from tests.tiny import LargestTensor


@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    empty=st.integers(0, 3),
    padding=st.integers(0, 3),
)
@settings(deadline=None)
def test_document_positions_against_a_loop(rows, empty, padding):
    seq_len = max(sum(lengths) for lengths in rows)
    lengths = [n for row in rows for n in (*row, *([seq_len - sum(row)] if sum(row) < seq_len else []))]
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    ends = ends[: len(ends) // 2] + [ends[len(ends) // 2]] * empty + ends[len(ends) // 2 :] + [ends[-1]] * padding

    positions = document_positions(torch.tensor(ends, dtype=torch.int32), len(rows), seq_len)

    expected = [position for length in lengths for position in range(length)]
    assert positions.dtype == torch.int64
    assert positions.shape == (len(rows), seq_len)
    assert positions.flatten().tolist() == expected


def yarn(**fields):
    return RopeScaling(**({"factor": 4.0, "original_max_position_embeddings": 32_768, "rope_type": "yarn"} | fields))


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("75m", None),
        ("1b", load_preset("1b").rope_scaling),
        ("8b", load_preset("8b").rope_scaling),
        ("75m", RopeScaling(factor=2.5, rope_type="linear")),
        ("8b", yarn()),
        ("8b", yarn(truncate=False, beta_fast=20.0, beta_slow=2.0)),
        ("75m", yarn(attention_factor=1.25)),
        ("75m", yarn(factor=1.0)),
        # The ramp would begin before the first pair, or end behind the last one.
        ("75m", yarn(original_max_position_embeddings=100)),
        ("75m", yarn(original_max_position_embeddings=2**31)),
        # The ramp would have no length.
        ("75m", yarn(original_max_position_embeddings=6)),
    ],
    ids=[
        "none",
        "llama3-1b",
        "llama3-8b",
        "linear",
        "yarn",
        "untruncated",
        "factor",
        "one",
        "short",
        "long",
        "singular",
    ],
)
def test_wavelengths_equal_hugging_face(name, scaling):
    config = load_preset(name, rope_scaling=scaling)
    embedding = LlamaRotaryEmbedding(HuggingFaceConfig(**config_to_hf(config)))
    torch.testing.assert_close(inverse_wavelengths(config), embedding.inv_freq)
    positions = torch.tensor([[0, 1, 700]])
    cos, sin = embedding(torch.zeros(1), positions)
    for ours, theirs in zip(rotation(config, positions), (cos, sin), strict=True):
        torch.testing.assert_close(ours[0, 0], theirs[0, :, : theirs.shape[-1] // 2], atol=1e-4, rtol=0)


def test_rotation_turns_pairs_by_the_position():
    config = load_preset("demo")
    half = config.attention_head_dim // 2
    positions = torch.tensor([[0, 1, 7, 40_000]])
    x = torch.randn(1, 2, 4, 2 * half, dtype=torch.float64)
    rotated = apply_rotary(x, *rotation(config, positions))

    angles = positions[0, :, None].double() * config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    expected = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    found = torch.complex(rotated[..., :half], rotated[..., half:])
    # Angles are float32: at position 40,000 their rounding is 40,000 * 2^-24, 0.0024 radians.
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(found[:, :, :3], expected[:, :, :3], atol=1e-5, rtol=0)


def test_low_precision_input_is_rotated_in_float32():
    config = load_preset("demo")
    cos, sin = rotation(config, torch.arange(1000, 1064)[None])
    x = torch.randn(1, 2, 64, config.attention_head_dim).bfloat16()
    with LargestTensor() as watched:
        rotated = apply_rotary(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert watched.bytes == x.nbytes, "both halves were joined in float32"
    assert torch.equal(rotated, apply_rotary(x.float(), cos, sin).bfloat16())
