"""Which type each tensor of a GGUF file gets, as llama.cpp's quantiser chooses.

Vectors, norms, routers and tables of positions stay F32. The head (or the embedding where that is the
head too) gets Q6_K beside any smaller type. The _M mixes give attn_v (and attn_qkv) and ffn_down more bits
in the first and last eighth of the layers and in every third between. Falcon, and mixtures of eight, have
rules of their own. Rows that are not whole blocks fall back to a type of blocks of 32, or to F16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lorimer.quant.gguf_blocks import BLOCKS


class FileType(NamedTuple):
    """llama.cpp's number for the mix, and the type of most of its tensors."""

    number: int
    dtype: str


FILE_TYPES = {
    "f32": FileType(0, "F32"),
    "f16": FileType(1, "F16"),
    "bf16": FileType(32, "BF16"),
    "q8_0": FileType(7, "Q8_0"),
    "q6_k": FileType(18, "Q6_K"),
    "q5_k_m": FileType(17, "Q5_K"),
    "q5_1": FileType(9, "Q5_1"),
    "q5_0": FileType(8, "Q5_0"),
    "q4_k_m": FileType(15, "Q4_K"),
    "q4_1": FileType(3, "Q4_1"),
    "q4_0": FileType(2, "Q4_0"),
}
# What stands in for a type of 256 numbers where rows are not a multiple of 256.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# From this depth on llama.cpp takes a model for the 70B one, whose small attn_v is worth more bits.
LAYERS_70B = 80
# Mixtral's number of experts, for which what all tokens share is worth more bits.
EIGHT = 8


def use_more_bits(layer: int, layers: int) -> bool:
    """Of 32 layers: 0-3, 28-31, and 6, 9, 12, 15, 18, 21, 24, 27."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True, slots=True)
class Mix:
    """A file of this kind (a key of FILE_TYPES). `tied`: the embedding is the head; `architecture` is
    llama.cpp's name, `experts` how many a mixture has."""

    kind: str
    layers: int
    tied: bool
    architecture: str = "llama"
    experts: int = 0

    def type_of(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of the tensor with this llama.cpp name."""
        dtype = FILE_TYPES[self.kind].dtype
        if len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")):
            return "F32"
        if dtype not in BLOCKS:
            return dtype
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            whole = shape[-1] % BLOCKS[dtype][1] == 0 and self.architecture != "falcon"
            dtype = "Q6_K" if whole and dtype != "Q8_0" else "Q8_0"
        elif name.startswith("blk."):
            dtype = self._in_layer(name, dtype)
        if shape[-1] % BLOCKS[dtype][1]:
            dtype = FALLBACK.get(dtype, dtype)
        return "F16" if shape[-1] % BLOCKS[dtype][1] else dtype

    def _in_layer(self, name: str, dtype: str) -> str:
        _, number, part, _ = name.split(".")
        medium = self.kind.endswith("_m")
        more = medium and use_more_bits(int(number), self.layers)
        if part in ("attn_v", "attn_qkv"):
            small = dtype == "Q4_K" and self.layers == LAYERS_70B and not more
            return "Q8_0" if self.experts == EIGHT else "Q6_K" if more else "Q5_K" if small else dtype
        if part == "attn_k":
            return "Q8_0" if self.experts == EIGHT else dtype
        if part == "attn_output":
            return "Q5_K" if self.experts == EIGHT and self.kind == "q4_k_m" else dtype
        if part.startswith("ffn_down") and more:
            first = int(number) < self.layers // 16
            return "Q5_K" if self.architecture == "falcon" and dtype == "Q4_K" and not first else "Q6_K"
        return dtype
