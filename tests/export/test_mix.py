"""Types of tensors against what llama.cpp's quantiser chose for the same shapes."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest

from lorimer.export.mix import FILE_TYPES, Mix, use_more_bits


def test_file_types_are_llama_cpps_numbers() -> None:
    for kind, (number, _) in FILE_TYPES.items():
        name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
        assert gguf.LlamaFileType[name] == number


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (1, [0]),
        (2, [1]),
        (8, [0, 3, 6, 7]),
        (16, [0, 1, 4, 7, 10, 13, 14, 15]),
        (30, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]),
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
    ],
)
def test_layers_with_more_bits(layers: int, more: list[int]) -> None:
    assert [layer for layer in range(layers) if use_more_bits(layer, layers)] == more


WIDE, ODD, TINY = (4096, 4096), (576, 576), (36, 36)
CASES = [
    # name, shape, kind, tied, wanted
    ("output_norm.weight", (4096,), "q4_k_m", False, "F32"),
    ("blk.0.attn_q.bias", (4096,), "q8_0", False, "F32"),
    ("blk.1.attn_q.weight", WIDE, "f16", False, "F16"),
    ("blk.1.attn_q.weight", TINY, "bf16", False, "BF16"),
    ("output.weight", WIDE, "f32", False, "F32"),
    ("blk.4.attn_q.weight", WIDE, "q4_k_m", False, "Q4_K"),
    ("blk.4.attn_v.weight", WIDE, "q4_k_m", False, "Q4_K"),
    ("blk.0.attn_v.weight", WIDE, "q4_k_m", False, "Q6_K"),
    ("blk.6.ffn_down.weight", WIDE, "q4_k_m", False, "Q6_K"),
    ("blk.6.ffn_up.weight", WIDE, "q4_k_m", False, "Q4_K"),
    ("blk.5.ffn_down.weight", WIDE, "q5_k_m", False, "Q5_K"),
    ("blk.6.ffn_down.weight", WIDE, "q5_k_m", False, "Q6_K"),
    ("blk.0.ffn_down.weight", WIDE, "q4_0", False, "Q4_0"),
    ("output.weight", WIDE, "q4_k_m", False, "Q6_K"),
    ("output.weight", WIDE, "q4_0", False, "Q6_K"),
    ("output.weight", WIDE, "q8_0", False, "Q8_0"),
    ("token_embd.weight", WIDE, "q4_k_m", True, "Q6_K"),
    ("token_embd.weight", WIDE, "q4_k_m", False, "Q4_K"),
    ("token_embd.weight", WIDE, "q4_1", False, "Q4_1"),
    # Rows that are no multiple of 256, or not even of 32.
    ("token_embd.weight", ODD, "q4_k_m", True, "Q8_0"),
    ("token_embd.weight", ODD, "q4_1", True, "Q8_0"),
    ("blk.4.attn_q.weight", ODD, "q4_k_m", True, "Q5_0"),
    ("blk.4.attn_q.weight", ODD, "q5_k_m", True, "Q5_1"),
    ("blk.0.attn_v.weight", ODD, "q4_k_m", True, "Q8_0"),
    ("blk.4.attn_q.weight", ODD, "q6_k", True, "Q8_0"),
    ("blk.4.attn_q.weight", TINY, "q4_k_m", True, "F16"),
    ("token_embd.weight", TINY, "q8_0", True, "F16"),
]


@pytest.mark.parametrize(("name", "shape", "kind", "tied", "wanted"), CASES)
def test_the_type_of_a_tensor(
    name: str, shape: tuple[int, ...], kind: str, tied: bool, wanted: str
) -> None:
    assert Mix(kind, 32, tied).type_of(name, shape) == wanted


SPECIAL = [
    # name, kind, architecture, experts, wanted
    ("blk.0.attn_qkv.weight", "q4_k_m", "gpt2", 0, "Q6_K"),
    ("blk.4.attn_qkv.weight", "q4_k_m", "gpt2", 0, "Q4_K"),
    ("blk.0.ffn_down.weight", "q4_k_m", "falcon", 0, "Q6_K"),
    ("blk.2.ffn_down.weight", "q4_k_m", "falcon", 0, "Q5_K"),
    ("blk.2.ffn_down.weight", "q5_k_m", "falcon", 0, "Q6_K"),
    ("blk.4.ffn_down.weight", "q4_k_m", "falcon", 0, "Q4_K"),
    ("output.weight", "q4_k_m", "falcon", 0, "Q8_0"),
    ("blk.4.attn_k.weight", "q4_0", "llama", 8, "Q8_0"),
    ("blk.4.attn_v.weight", "q4_k_m", "llama", 8, "Q8_0"),
    ("blk.4.attn_output.weight", "q4_k_m", "llama", 8, "Q5_K"),
    ("blk.4.attn_output.weight", "q5_k_m", "llama", 8, "Q5_K"),
    ("blk.4.attn_output.weight", "q4_0", "llama", 8, "Q4_0"),
    ("blk.4.attn_k.weight", "q4_k_m", "qwen3moe", 128, "Q4_K"),
    ("blk.6.ffn_down_exps.weight", "q4_k_m", "qwen3moe", 128, "Q6_K"),
    ("blk.6.ffn_up_exps.weight", "q4_k_m", "qwen3moe", 128, "Q4_K"),
    ("blk.6.ffn_gate_inp.weight", "q8_0", "qwen3moe", 128, "F32"),
    ("position_embd.weight", "f16", "gpt2", 0, "F32"),
    ("blk.0.attn_q_norm.weight", "q8_0", "stablelm", 0, "F32"),
]


@pytest.mark.parametrize(("name", "kind", "architecture", "experts", "wanted"), SPECIAL)
def test_what_architectures_have_of_their_own(
    name: str, kind: str, architecture: str, experts: int, wanted: str
) -> None:
    mix = Mix(kind, 32, False, architecture, experts)
    assert mix.type_of(name, (experts, *WIDE) if "_exps" in name else WIDE) == wanted


def test_the_70b_model_gets_more_bits_for_its_small_attn_v() -> None:
    types = Counter(
        Mix("q4_k_m", 80, tied=False).type_of(f"blk.{layer}.attn_v.weight", (1024, 8192))
        for layer in range(80)
    )
    assert types == {"Q5_K": 40, "Q6_K": 40}


def test_the_types_that_llama_cpp_gave_smollm2() -> None:
    """What llama.cpp's own quantiser makes of SmolLM2-135M as Q4_K_M."""
    shapes = {
        "attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576),
        "ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536),
    }  # fmt: skip
    types = Counter(
        Mix("q4_k_m", 30, tied=True).type_of(f"blk.{layer}.{part}.weight", shape)
        for layer in range(30)
        for part, shape in shapes.items()
    )
    assert types == {"Q5_0": 166, "Q4_K": 16, "Q6_K": 14, "Q8_0": 14}
