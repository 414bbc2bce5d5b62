"""Bases whose weights are quantised as they are loaded, or kept as a GGUF file has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_files import write_model
from lorimer.bases.open import open_base
from lorimer.config import QuantConfig
from lorimer.errors import BaseError, UserError
from lorimer.model.load import load_decoder, read_weight, trained_weight
from lorimer.quant.linear import DenseLinear, QuantLinear
from lorimer.quant.part import whole
from lorimer.quant.storage import numbers, quantise
from tiny import FP32, difference, make_tiny, our_logits, random_rows

ROWS = random_rows([9, 14], vocab=40)


def dense_twin(decoder):
    """Each quantised weight as the dense weight of the same numbers, in place."""
    for group in decoder.projections():
        group.linear.weight = DenseLinear(group.linear.weight.dequantise())
    for table in (decoder.embedding, decoder.head):
        table.weight = DenseLinear(table.weight.dequantise())
    return decoder


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_base_computes_what_its_numbers_say(
    family: str, kind: str, tied: bool, tmp_path: Path
) -> None:
    tiny = make_tiny(tmp_path / "base", family, tie_word_embeddings=tied)
    quant = QuantConfig(kind=kind, embeddings=True)
    decoder = load_decoder(tiny.base, FP32, quant)
    assert all(isinstance(group.linear.weight, QuantLinear) for group in decoder.projections())
    assert isinstance(decoder.embedding.weight, QuantLinear)
    assert (decoder.head.weight is decoder.embedding.weight) == tied
    # Each projection is quantised on its own: blocks do not run from one into the next.
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = read_weight(tiny.base, decoder.spec, name)
    part = quantise(whole(weight), tuple(weight.shape), quant)
    qkv = decoder.layers[1].qkv
    found = qkv.linear.weight.dequantise()[qkv.rows[0] : qkv.rows[0] + qkv.rows[1]]
    assert torch.equal(found, numbers(part, 0, part.shape[0]))
    mine = our_logits(decoder, ROWS)
    assert decoder.frozen_bytes < 0.4 * tiny.decoder.frozen_bytes
    for one, other in zip(mine, our_logits(dense_twin(decoder), ROWS), strict=True):
        assert difference(one, other) < 2e-6
    assert difference(mine[0], our_logits(tiny.decoder, ROWS)[0]) > 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_gguf_file_is_kept_as_it_is(kind: str, embeddings: bool, tmp_path: Path) -> None:
    """Query and key rows lie there in pairs: undone by whole rows, the blocks stay as they are."""
    base = open_base(write_model(tmp_path / "base.gguf", dtype=kind))
    kept = load_decoder(base, FP32, QuantConfig(kind="keep", embeddings=embeddings))
    dense = load_decoder(base, FP32)
    for mine, wanted in zip(kept.projections(), dense.projections(), strict=True):
        assert isinstance(mine.linear.weight, QuantLinear)
        assert torch.equal(mine.linear.weight.dequantise(), wanted.linear.weight.dequantise())
    assert isinstance(kept.embedding.weight, QuantLinear) == embeddings
    stored = sum(base.tensors[f"model.layers.0.{n}.weight"].nbytes for n in PROJECTIONS)
    assert sum(group.linear.weight.nbytes for group in kept.projections()) == stored
    if kind == "Q8_0":
        for one, other in zip(our_logits(kept, ROWS), our_logits(dense, ROWS), strict=True):
            assert difference(one, other) < 2e-6


PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def test_there_must_be_something_to_keep(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base").base
    with pytest.raises(UserError, match="this one is not"):
        load_decoder(base, FP32, QuantConfig(kind="keep"))


def test_a_stack_with_one_dense_weight_is_dense(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    path = write_model(
        tmp_path / "base.gguf",
        dtype="Q8_0",
        without=["blk.0.attn_k"],
        extra={"blk.0.attn_k.weight": values},
    )
    decoder = load_decoder(open_base(path), FP32, QuantConfig(kind="keep"))
    assert isinstance(decoder.layers[0].qkv.linear.weight, DenseLinear)
    assert isinstance(decoder.layers[0].projections()[-1].linear.weight, QuantLinear)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_that_is_not_finite_is_named(bad: float, kind: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base").folder
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][7, 5] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"layers\.2\.mlp\.down_proj\.weight` holds NaN or infinity"):
        load_decoder(open_base(folder), FP32, QuantConfig(kind=kind))


def test_norms_of_heads_are_no_projections(tmp_path: Path) -> None:
    """A matrix in the files, which is not quantised."""
    tiny = make_tiny(tmp_path, "cohere", use_qk_norm=True)
    name = "model.layers.0.self_attn.q_norm.weight"
    kept = trained_weight(tiny.base, tiny.decoder.spec, name, QuantConfig(kind="nf4"))
    assert torch.equal(kept, read_weight(tiny.base, tiny.decoder.spec, name))
    assert kept.dim() == 2
