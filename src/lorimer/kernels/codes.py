"""What the sixteen codes of four bits stand for, float32, as bitsandbytes has them.

NF4's are quantiles of a normal distribution (arXiv 2305.14314, section 3); FP4's have a sign, two bits of
exponent and one of fraction, in twelfths.
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
