"""Checkpoints of bitsandbytes: read as they are, written as they are, and what is wrong with one named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorimer.bases.open import open_base
from lorimer.config import QuantConfig
from lorimer.errors import BaseError
from lorimer.model.load import load_decoder, read_weight
from lorimer.quant import bnb, nf4
from lorimer.quant.linear import QuantLinear
from tiny import FP32, difference, make_tiny, our_logits, random_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")

KEEP = QuantConfig(kind="keep")


def linear_names(folder: Path) -> list[str]:
    return [name for name in load_file(folder / "model.safetensors") if name.endswith("_proj.weight")]


def write_checkpoint(folder: Path, kind: str = "nf4", double: bool = True) -> Path:
    """A tiny model whose projections bitsandbytes itself has quantised and packed."""
    make_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in linear_names(folder):
        data, state = functional.quantize_4bit(
            tensors.pop(name), blocksize=64, compress_statistics=double, quant_type=kind
        )
        tensors[name] = data
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, **changes: object) -> None:
    """Put these tensors in place of those that end so; None takes them away."""
    tensors = load_file(folder / "model.safetensors")
    first = "model.layers.0.mlp.up_proj.weight"
    for ending, value in changes.items():
        name = next(n for n in tensors if n.startswith(first) and n.endswith(ending))
        del tensors[name]
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.trap(57)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_is_read_as_it_is(kind: str, double: bool, tmp_path: Path) -> None:
    base = open_base(write_checkpoint(tmp_path / "base", kind, double))
    stored = load_file(base.path / "model.safetensors")
    spec = load_decoder(base, FP32).spec
    for name in linear_names(base.path):
        part = bnb.read_part(base, name)
        assert torch.equal(part.data, stored[name].flatten())
        state = functional.QuantState.from_dict(
            {key.removeprefix(f"{name}."): v for key, v in stored.items() if key.startswith(f"{name}.")},
            device=torch.device("cpu"),
        )
        theirs = functional.dequantize_4bit(stored[name], state)
        # Its CPU kernel is wrong where a row is not whole blocks; the codes and scales are not.
        if part.shape[1] % 64 == 0:
            assert torch.equal(read_weight(base, spec, name), theirs)
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(part.scales(0, len(scales)), scales.float())
        # And out again, the same bytes under the same names.
        again = bnb.state_tensors(name, part, "float32")
        wanted = {key: value for key, value in stored.items() if key == name or key.startswith(f"{name}.")}
        assert set(again) == set(wanted)
        for key, value in again.items():
            if "quant_state" in key:
                assert json.loads(bytes(value)) == json.loads(bytes(wanted[key]))
            else:
                assert torch.equal(value, wanted[key]), key


def test_kept_or_dequantised_it_computes_the_same(tmp_path: Path) -> None:
    base = open_base(write_checkpoint(tmp_path / "base"))
    rows = random_rows([9, 14])
    dense, kept = load_decoder(base, FP32), load_decoder(base, FP32, KEEP)
    assert all(isinstance(group.linear.weight, QuantLinear) for group in kept.projections())
    for mine, wanted in zip(our_logits(kept, rows), our_logits(dense, rows), strict=True):
        assert difference(mine, wanted) < 2e-6
    assert base.parameters == open_base(make_tiny(tmp_path / "dense").folder).parameters


def test_eight_bits_are_read_as_they_are(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base").folder
    tensors = load_file(folder / "model.safetensors")
    wanted = {}
    for name in linear_names(folder):
        codes, scales, _ = functional.int8_vectorwise_quant(tensors.pop(name).half())
        tensors[name], tensors[f"{name.removesuffix('.weight')}.SCB"] = codes, scales.float()
        wanted[name] = codes.float() * (scales.float() / 127).unsqueeze(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = open_base(folder)
    decoder = load_decoder(base, FP32, KEEP)
    for name, value in wanted.items():
        assert torch.equal(read_weight(base, decoder.spec, name), value)
    change(folder, weight=torch.zeros(1))  # the rest is not read before this is found wrong
    with pytest.raises(BaseError, match="has the shape"):
        load_decoder(open_base(folder), FP32, KEEP)


def packed(state: dict[str, object]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [52, 36]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight.absmax": None}, "absmax` is missing"),
        ({"weight.nested_quant_map": None}, "nested_quant_map` is missing"),
        ({"bitsandbytes__nf4": None}, "bitsandbytes__nf4` is missing"),
        ({"weight.absmax": torch.zeros(3, dtype=torch.uint8)}, r"absmax` is U8 \[3\]"),
        ({"weight.absmax": torch.zeros(30)}, r"absmax` is F32 \[30\]"),
        ({"weight.quant_map": torch.zeros(16)}, "quant_map` is another table"),
        ({"weight.nested_quant_map": torch.zeros(256)}, "nested_quant_map` is another table"),
        ({"bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, "is not a quant state"),
        ({"bitsandbytes__nf4": packed(STATE)}, "nested blocks of None"),
        ({"bitsandbytes__nf4": packed(STATE | NESTED | {"blocksize": 63})}, "blocks of 63"),
        ({"bitsandbytes__nf4": packed(STATE | NESTED | {"quant_type": "fp4"})}, "says fp4"),
        ({"bitsandbytes__nf4": packed(STATE | NESTED | {"shape": [52]})}, r"shape \[52\]"),
        ({"bitsandbytes__nf4": packed(STATE | NESTED | {"shape": [10**9, 10**9]})}, "has the shape"),
        ({"bitsandbytes__nf4": packed(STATE | NESTED | {"shape": [36, 52]})}, "has the shape"),
        ({"up_proj.weight": torch.zeros(5, 1, dtype=torch.uint8)}, r"up_proj.weight` is U8 \[5, 1\]"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "base")
    change(folder, **changes)
    for quant in (KEEP, QuantConfig()):
        with pytest.raises(BaseError, match=said):
            load_decoder(open_base(folder), FP32, quant)


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", double=False)
    broken = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight.absmax"].clone()
    broken[4] = float("nan")
    change(folder, **{"weight.absmax": broken})
    with pytest.raises(BaseError, match=r"up_proj\.weight` holds NaN"):
        load_decoder(open_base(folder), FP32, KEEP)


def test_ours_is_loaded_by_bitsandbytes() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    part = nf4.quantise(weight, "nf4", 64, double=True)
    tensors = bnb.state_tensors("w", part, "bfloat16")
    state = functional.QuantState.from_dict(
        {key.removeprefix("w."): value for key, value in tensors.items() if key != "w"},
        device=torch.device("cpu"),
    )
    assert state.dtype == torch.bfloat16
    theirs = functional.dequantize_4bit(tensors["w"], state)
    assert torch.equal(theirs, nf4.numbers(part, 0, 48).bfloat16())
