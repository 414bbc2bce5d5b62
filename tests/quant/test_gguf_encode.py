"""GGUF's block types written: the gguf package's bytes, and its numbers read back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from lorimer.errors import UserError
from lorimer.quant.gguf_blocks import BLOCKS, PLAIN, dequantise
from lorimer.quant.gguf_encode import CHUNK, ENCODERS, encode, encoded_bytes

torch.set_num_threads(1)
EQUAL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
K_TYPES = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}


def numbers(kind: str, rows: int = 24) -> Tensor:
    """Weights as they are met: near normal, heavy tails, rows of any size, and what breaks searches."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((rows, 512), generator=generator) * 0.05
    if kind == "heavy tails":
        x *= torch.randn(x.shape, generator=generator).exp()
    if kind == "rows of any size":
        x *= torch.logspace(-0.5, 3, rows).unsqueeze(1)
    if kind == "odd":
        x[0] = 0
        x[1] = 0.25
        x[2] = -0.25
        x[3] = -1 + 1e-4 * x[3]
        x[4] = 3 + 1e-2 * x[4]
        x[5, 1:] = 0
        x[6] *= 1e-20
        x[7] = x[7].sign()
        x[8] = torch.arange(512) / 512
    return x


KINDS = ("normal", "heavy tails", "rows of any size", "odd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", EQUAL)
def test_simple_types_are_the_gguf_packages_bytes(dtype: str, kind: str) -> None:
    x = numbers(kind)
    wanted = gguf.quantize(x.numpy(), GGMLQuantizationType[dtype]).view(np.uint8).ravel()
    assert np.array_equal(encode(x, dtype), wanted)


def test_halves_of_a_code_go_away_from_zero_as_in_ggml() -> None:
    x = torch.zeros((1, 32))
    x[0, :6] = torch.tensor([127, 0.5, -0.5, 1.5, -1.5, 0.49999997])
    assert encode(x, "Q8_0")[2:8].view(np.int8).tolist() == [127, 1, -1, 2, -2, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*BLOCKS, *PLAIN])
def test_every_type_reads_back_alike_here_and_in_the_gguf_package(dtype: str, kind: str) -> None:
    x = numbers(kind)
    raw = encode(x, dtype)
    assert raw.nbytes == encoded_bytes(x.shape, dtype)
    mine = dequantise(raw, dtype, tuple(x.shape)).numpy()
    if dtype != "F64":
        theirs = gguf.dequantize(raw.reshape(len(x), -1), GGMLQuantizationType[dtype])
        assert np.array_equal(mine, theirs.reshape(mine.shape))
    assert np.isfinite(mine).all()


def plain_error(x: Tensor, dtype: str) -> Tensor:
    """Squared error of each row with each group's range (or largest number) over the largest code and
    scales that cost no bits: what the type allows without a search."""
    size = 16 if dtype == "Q6_K" else 32
    groups = x.view(len(x), -1, size)
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    if dtype == "Q6_K":
        low = -groups.abs().amax(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / K_TYPES[dtype]
    if dtype == "Q6_K":
        step = -low / 32
    codes = ((groups - low) / step.clamp_min(1e-30)).round().clamp(0, K_TYPES[dtype])
    return (codes * step + low - groups).square().flatten(1).sum(1)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("dtype", K_TYPES)
def test_k_types_err_no_more_than_a_plain_cut_of_each_groups_range(dtype: str, kind: str) -> None:
    x = numbers(kind, 200)
    error = (dequantise(encode(x, dtype), dtype, tuple(x.shape)) - x).square().sum(1)
    plain = plain_error(x, dtype)
    assert float((error / plain).mean()) < 1
    assert float(error.sum()) < float(plain.sum())


# The relative squared error of llama.cpp's own quantiser (ggml 0.25, no importance matrix) on NORMAL.
GGML = {"Q4_K": 5.088e-3, "Q5_K": 1.3046e-3, "Q6_K": 3.1464e-4}


@pytest.mark.parametrize("dtype", GGML)
def test_k_types_are_as_good_as_ggmls(dtype: str) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2048, 512)).astype(np.float32))
    error = (dequantise(encode(x, dtype), dtype, tuple(x.shape)) - x).square().mean() / x.square().mean()
    assert float(error) == pytest.approx(GGML[dtype], rel=4e-3)


@pytest.mark.parametrize("dtype", ENCODERS)
def test_chunks_do_not_show(dtype: str) -> None:
    x = numbers("normal").repeat(20, 1)
    assert x.numel() > CHUNK
    one = encode(x[:24], dtype)
    assert np.array_equal(encode(x, dtype), np.tile(one, 20))


def test_a_block_by_hand() -> None:
    """Q4_0 with the largest number -8: d = 1, and the codes are the numbers + 8."""
    x = torch.zeros((1, 32))
    x[0, 0], x[0, 1], x[0, 16] = -8, 3, 7
    assert encode(x, "Q4_0").tolist() == [0x00, 0x3C, 0xF0, 0x8B, *[0x88] * 14]


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        (torch.full((1, 32), torch.nan), "Q8_0", "a weight is nan"),
        (torch.full((1, 32), torch.inf), "BF16", "a weight is inf"),
        (torch.full((1, 32), 70_000.0), "F16", "a weight is 70000, which F16 cannot hold"),
        (torch.full((1, 32), -70_000.0), "Q4_0", "which Q4_0 cannot hold"),
        (torch.zeros((2, 48)), "Q4_0", "not whole Q4_0 blocks of 32"),
        (torch.zeros((2, 128)), "Q6_K", "not whole Q6_K blocks of 256"),
        (torch.zeros((2, 256)), "IQ4_XS", "IQ4_XS cannot be written"),
    ],
)
def test_what_cannot_be_stored_is_refused(values: Tensor, dtype: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode(values, dtype)


def test_sizes_are_those_of_the_gguf_package() -> None:
    for dtype in (*BLOCKS, *PLAIN):
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
        assert encoded_bytes((3, 512), dtype) == 3 * 512 // elements * size
