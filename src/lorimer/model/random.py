"""A decoder of a given shape with random weights, without files: for probes and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lorimer.config import QuantConfig
from lorimer.model.decoder import Decoder
from lorimer.model.load import STRETCH, Place, Reader, assemble
from lorimer.model.spec import ModelSpec


class _Random(Reader):
    """Numbers in place of files, small enough that activations stay finite."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        step = max(1, STRETCH // shape[1])
        for first in range(0, shape[0], step):
            yield torch.randn((min(step, shape[0] - first), shape[1])) * 0.02


def random_decoder(spec: ModelSpec, dtype: torch.dtype, quant: QuantConfig) -> Decoder:
    """On the CPU, in this type, its weights stored as `quant` says (not `keep`)."""
    return assemble(_Random(spec, Place(torch.device("cpu"), dtype), quant))
