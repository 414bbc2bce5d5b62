"""Rotary frequencies of every scaling against transformers' own, and tables for packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lorimer.model.families import read_spec
from lorimer.model.rope import RopeTables, frequencies, plain_frequencies
from lorimer.model.spec import RopeSpec
from tiny import FP32, SHAPE

SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.5], [1.5, 2.0, 3.0, 4.0, 6.0]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 0.8,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
    },
    "longrope attention": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
        "attention_factor": 1.2,
    },
}


def config_with(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**SHAPE, rope_parameters=scaling | {"rope_theta": 5000.0})


def spec_of(config: dict[str, Any]) -> RopeSpec:
    return read_spec(config, path="made").rope


@pytest.mark.trap(56)
@pytest.mark.parametrize("length", [8, 40, 100])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str, length: int) -> None:
    config = config_with(SCALINGS[name])
    theirs, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config, seq_len=length)
    mine, mine_factor = frequencies(spec_of(config.to_dict()), length)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert mine_factor == pytest.approx(factor, rel=1e-6)


def test_plain_frequencies_by_hand() -> None:
    torch.testing.assert_close(plain_frequencies(RopeSpec(10_000.0, 4)), torch.tensor([1.0, 0.01]))


@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_older_spelling_is_the_same(word: str) -> None:
    older = SHAPE | {
        "model_type": "llama",
        "rope_theta": 5000.0,
        "rope_scaling": {word: "linear", "factor": 2.5},
    }
    newer = config_with(SCALINGS["linear"]).to_dict()
    assert torch.equal(frequencies(spec_of(older), 8)[0], frequencies(spec_of(newer), 8)[0])


def test_original_context_beside_the_scaling() -> None:
    """Phi writes it at the top of its config; there it decides."""
    config = SHAPE | {"model_type": "llama", "original_max_position_embeddings": 16}
    config["rope_scaling"] = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    spec = spec_of(config)
    assert spec.settings["original_max_position_embeddings"] == 16
    assert torch.equal(frequencies(spec, 16)[0], plain_frequencies(spec) / torch.tensor(SHORT))
    assert torch.equal(frequencies(spec, 17)[0], plain_frequencies(spec) / torch.tensor(LONG))


@pytest.mark.parametrize("name", SCALINGS)
def test_a_packed_row_turns_as_it_does_alone(name: str) -> None:
    """Each row has the frequencies of its own length, whatever lies beside it."""
    config = config_with(SCALINGS[name])
    tables = RopeTables(spec_of(config.to_dict()), torch.float32, FP32.device)
    lengths = (5, 70, 17, 90, 300)
    cos, sin = tables.for_rows(lengths)
    start = 0
    for length in lengths:
        embedding = LlamaRotaryEmbedding(config)
        wanted = embedding(torch.zeros(1), torch.arange(length).unsqueeze(0))
        for mine, theirs in zip((cos, sin), wanted, strict=True):
            torch.testing.assert_close(mine[start : start + length], theirs[0, :, :5], rtol=0, atol=2e-5)
        start += length
    assert start == cos.shape[0]


@pytest.mark.parametrize("name", ["linear", "dynamic", "longrope", "yarn"])
def test_single_positions_are_those_of_a_row_that_ends_there(name: str) -> None:
    tables = RopeTables(spec_of(config_with(SCALINGS[name]).to_dict()), torch.float32, FP32.device)
    for position, cos in zip((0, 12, 16, 99), tables.at((0, 12, 16, 99))[0], strict=True):
        torch.testing.assert_close(cos, tables.for_rows([position + 1])[0][-1])


def test_part_of_the_features_turns() -> None:
    config = SHAPE | {"model_type": "llama", "head_dim": 12, "partial_rotary_factor": 0.5}
    spec = spec_of(config)
    assert spec.dimensions == 6
    torch.testing.assert_close(plain_frequencies(spec), 10_000.0 ** (-torch.arange(3) / 3))
