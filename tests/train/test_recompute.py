"""The memory ladder: each rung keeps less and gives the same gradients, to the last bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorimer.config import LoraConfig, QuantConfig
from lorimer.data.pack import make_pack
from lorimer.data.template import Example
from lorimer.kernels.native import library
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import LoraDropout
from lorimer.model import recompute as recompute_module
from lorimer.model.load import Place, load_decoder
from lorimer.model.loss import pack_loss
from tiny import Tiny, make_tiny, shake

RUNGS = ("mlp", "layers", "offload")
CPU = torch.device("cpu")


def examples(prefix: int) -> list[Example]:
    numbers = np.random.Generator(np.random.PCG64(1))
    start = numbers.integers(3, 90, prefix).astype(np.int32)
    rows = [np.concatenate([start, numbers.integers(3, 90, n).astype(np.int32)]) for n in (20, 31, 12)]
    return [Example(ids, np.arange(len(ids)) >= len(ids) // 2, f"row {i}") for i, ids in enumerate(rows)]


def step(
    tiny: Tiny, rung: str, dtype: torch.dtype, *, dropout: float, prefix: int, quant: str = "none"
) -> tuple[Tensor, float, int]:
    """Gradients, loss, and the bytes of distinct tensors that autograd keeps for the backward."""
    decoder = load_decoder(tiny.base, Place(CPU, dtype), QuantConfig(kind=quant))
    saved = ["norm"] if prefix else []
    adapter, _ = new_adapter(decoder, LoraConfig(r=4, modules_to_save=saved), seed=0)
    shake(adapter)
    decoder.recompute = rung
    pack = make_pack(examples(prefix), [0, 1, 2], share=bool(prefix))
    masks = LoraDropout(dropout, 0, dtype, CPU).for_pack(3, pack.rows, pack.lengths) if dropout else None
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = pack_loss(decoder, pack, weight=0.01, dropouts=masks)
    before = sum(kept.values())
    loss.backward()
    assert adapter.flat.grad is not None
    return adapter.flat.grad.clone(), loss.item(), before


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("base") / "tiny", request.param)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(("dropout", "prefix"), [(0.0, 0), (0.1, 0), (0.0, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ["native", "reference"])
def test_gradients_are_the_same(
    tiny: Tiny,
    rung: str,
    dropout: float,
    prefix: int,
    dtype: torch.dtype,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute_module, "LEAST_BYTES", 256)
    with library.using(library.REFERENCE if isa == "reference" else library.active()):
        run = partial(step, tiny, dtype=dtype, dropout=dropout, prefix=prefix)
        wanted, loss, _ = run("none")
        found, again, _ = run(rung)
    assert again == loss
    assert torch.equal(found, wanted)
    assert found.abs().max() > 0


@pytest.mark.trap(47)
@pytest.mark.parametrize("rung", ["none", *RUNGS])
def test_every_tensor_of_the_adapter_gets_a_gradient(tiny: Tiny, rung: str) -> None:
    """A, B and what is trained in full, in the first layer as in the last."""
    decoder = load_decoder(tiny.base, Place(CPU, torch.float32))
    saved = ["embed_tokens", "norm", "input_layernorm", "lm_head"]
    adapter, _ = new_adapter(decoder, LoraConfig(r=4, modules_to_save=saved), seed=0)
    shake(adapter)
    decoder.recompute = rung
    pack_loss(decoder, make_pack(examples(0), [0, 1, 2]), weight=0.01)[0].backward()
    without = [
        name for name, value in adapter.tensors.items() if value.grad is None or not value.grad.any()
    ]
    assert without == []
    adapted = len([name for name in adapter.tensors if "lora_B" in name])
    assert adapted == 7 * decoder.spec.layers


def test_each_rung_keeps_less(tiny: Tiny) -> None:
    kept = {r: step(tiny, r, torch.float32, dropout=0.0, prefix=0)[2] for r in ("none", "mlp", "layers")}
    tokens = sum(len(example.ids) for example in examples(0))
    gate_up = 4 * tokens * 2 * tiny.base.config["intermediate_size"]
    # Of all layers but the last, whose gate and up exist for predicting positions only.
    assert kept["none"] - kept["mlp"] >= 2 * gate_up * 0.9
    assert kept["layers"] < 0.55 * kept["none"]


def test_on_quantised_weights_too(tiny: Tiny) -> None:
    run = partial(step, tiny, dtype=torch.float32, dropout=0.0, prefix=0, quant="nf4")
    assert torch.equal(run("layers")[0], run("none")[0])


def test_what_is_kept_in_a_file_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.randn(300, 200, dtype=dtype)
        kept = recompute_module._to_file(given.t())
        assert not isinstance(kept, Tensor)
        assert torch.equal(recompute_module._from_file(kept), given.t())
    assert not list(tmp_path.iterdir())
