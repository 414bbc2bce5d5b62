"""Facts of quantised weights that kernels and storage share.

CODES   what the sixteen codes of four bits stand for, float32, as bitsandbytes has them: NF4's are
        quantiles of a normal distribution (arXiv 2305.14314, section 3), FP4's have a sign, two bits of
        exponent and one of fraction, in twelfths
BLOCKS  bytes and numbers of a block of each GGUF type
KINDS   every storage, in the order of quantised.hpp
"""

from __future__ import annotations

import torch

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)

CODES = {
    "nf4": torch.tensor(_NF4),
    "fp4": torch.tensor([*_FP4, *(-value for value in _FP4)]) / 12,
}
BLOCKS = {
    "Q4_0": (18, 32), "Q4_1": (20, 32), "Q5_0": (22, 32), "Q5_1": (24, 32), "Q8_0": (34, 32),
    "Q4_K": (144, 256), "Q5_K": (176, 256), "Q6_K": (210, 256),
}  # fmt: skip
KINDS = ("4 bits", "int8", *BLOCKS)
