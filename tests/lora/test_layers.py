"""The trained parameters: where they lie, how they begin, and their gradients against PEFT's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from lorimer.bases.open import open_base
from lorimer.config import LoraConfig, TrainConfig
from lorimer.data.pack import make_pack, split_into_packs
from lorimer.errors import ConfigError
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import MASKS, Adapter, LoraDropout, remove
from lorimer.lora.stacked import unstack
from lorimer.model.decoder import Decoder
from lorimer.model.load import load_decoder
from lorimer.model.loss import pack_loss, pack_losses
from lorimer.train.optimizer import AdamW
from lorimer.train.step import train_step
from tiny import (
    FAMILIES,
    FP32,
    PEFT_NOISE,
    Tiny,
    difference,
    example,
    make_tiny,
    our_logits,
    peft_name,
    random_rows,
    save,
    shake,
)

pytestmark = PEFT_NOISE
ROWS = random_rows((6, 11, 11, 3, 24))


def adapt(tiny: Tiny, *, seed: int = 3, tokens: Sequence[int] = (), **settings: Any) -> Adapter:
    config = LoraConfig(**({"alpha": 4} | settings))
    return new_adapter(tiny.decoder, config, seed=seed, tokens=tokens)[0]


def checksum(decoder: Decoder) -> str:
    """Of every frozen number of the decoder."""
    digest = hashlib.sha256()
    tensors = [decoder.embedding.weight.dequantise(), decoder.head.weight.dequantise()]
    for group in decoder.projections():
        tensors += [group.linear.weight.weight_OI]  # type: ignore[attr-defined]
        tensors += [] if group.linear.bias_O is None else [group.linear.bias_O]
    for tensor in tensors + [slot.weight_H for slot in decoder.norms()]:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def peft_gradients(peft: Any, rank: int) -> dict[str, Tensor | None]:
    """By our names; PEFT's gradients for all experts of a layer as those of each."""
    grads = {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}
    plain = {peft_name(name): grad for name, grad in grads.items() if ".experts." not in name}
    stacked = {
        name.removeprefix("base_model.model.").replace(".default", ""): grad
        for name, grad in grads.items()
        if ".experts." in name and grad is not None
    }
    return plain | unstack(stacked, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], rank)


EVERYTHING = {
    "bias": "all",
    "modules_to_save": ["norm", "input_layernorm", "post_attention_layernorm", "embed_tokens", "lm_head"],
}
TABLES = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
TIED = {"tie_word_embeddings": True}
# name -> family, changes to the model, settings of the adapter
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"r": 3, "alpha": 5}),
    "llama dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}},
        {"r": 3, "alpha": 5, "target_modules": ["v_proj", "o_proj"]},
    ),
    "mistral, rsLoRA": ("mistral", {}, {"r": 4, "alpha": 3, "rslora": True}),
    "qwen2, all biases": ("qwen2", {}, {"r": 2, "bias": "all", "target_modules": ["k_proj", "down_proj"]}),
    "qwen2, biases of adapted": ("qwen2", {}, {"r": 2, "bias": "lora_only", "target_modules": ["k_proj"]}),
    "qwen2, everything": ("qwen2", {}, {"r": 2, "alpha": 4} | EVERYTHING),
    "llama, tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"r": 2, "alpha": 4, "target_modules": "mlp", "modules_to_save": ["embed_tokens"]},
    ),
    "qwen3, head norms": (
        "qwen3",
        {},
        {"r": 3, "alpha": 9, "modules_to_save": ["q_norm", "k_norm"], "layers": [0, 2]},
    ),
    "falcon, all biases": ("falcon", {}, {"r": 2, "bias": "all"}),
    "gpt_neox, LayerNorms": ("gpt_neox", {}, {"r": 2, "modules_to_save": ["input_layernorm"]}),
    "gemma2, norms": ("gemma2", {}, {"r": 2, "modules_to_save": ["post_attention_layernorm", "norm"]}),
    "olmo2, norms": ("olmo2", {}, {"r": 2, "modules_to_save": ["q_norm", "post_feedforward_layernorm"]}),
    "gemma, embedding": ("gemma", {}, {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "gpt2, positions": ("gpt2", {}, {"r": 2, "modules_to_save": ["wpe", "wte"]}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}, {"r": 3, "alpha": 5}),
    "cohere, heads normed": ("cohere", {"use_qk_norm": True}, {"r": 3, "alpha": 5}),
    "stablelm, heads normed": ("stablelm", {"qk_layernorm": True}, {"r": 3, "alpha": 5}),
    "llama, LoRA on both tables": ("llama", {}, {"r": 3, "alpha": 5} | TABLES),
    "qwen2, LoRA on a tied pair": ("qwen2", TIED, {"r": 3, "alpha": 5} | TABLES),
    "gemma2, LoRA on scaled and capped": ("gemma2", {}, {"r": 2} | TABLES),
    "gemma3, LoRA on a scaled embedding": ("gemma3_text", TIED, {"r": 2} | TABLES),
    "cohere, rsLoRA on a scaled head": ("cohere", {}, {"r": 2, "rslora": True} | TABLES),
    "llama, rows": ("llama", {}, {"r": 2, "tokens": [ROWS[0][2], 99, ROWS[1][1]]}),
    "qwen2, rows of a tied pair": ("qwen2", TIED, {"r": 2, "tokens": [ROWS[0][2], 99]}),
    "gemma3, rows of a tied pair": ("gemma3_text", TIED, {"r": 2, "tokens": [ROWS[0][2], 99]}),
    "gemma2, rows": ("gemma2", {}, {"r": 2, "tokens": [ROWS[0][2], 99]}),
} | {family: (family, {}, {"r": 3, "alpha": 5}) for family in FAMILIES if family != "qwen3_moe"}


@pytest.mark.trap(42)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_and_gradients_equal_peft(name: str, smoothing: float, tmp_path: Path) -> None:
    """The same files in transformers and PEFT, autograd through all of it, one row at a time."""
    family, changes, settings = ADAPTERS[name]
    tiny = make_tiny(tmp_path / "base", family, **changes)
    adapter = adapt(tiny, **settings)
    shake(adapter)
    save(tmp_path / "adapter", tiny, adapter)

    examples = [example(row) for row in ROWS]
    pack = make_pack(examples, range(len(ROWS)))
    loss, _ = pack_loss(tiny.decoder, pack, weight=1 / pack.trained_tokens, smoothing=smoothing)
    loss.backward()

    peft = PeftModel.from_pretrained(tiny.hf, tmp_path / "adapter", is_trainable=True).eval()
    total = torch.zeros(())
    for row in ROWS:
        logits = peft(torch.tensor([row])).logits[0]
        part = F.cross_entropy(
            logits[1:-1], torch.tensor(row[2:]), reduction="sum", label_smoothing=smoothing
        )
        total = total + part / pack.trained_tokens
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)

    theirs = peft_gradients(peft, settings["r"])
    assert set(theirs) == set(adapter.tensors)
    if adapter.spec.tie and adapter.spec.modules_to_save:  # one tensor here, two copies there
        both = theirs["model.embed_tokens.weight"] + theirs["lm_head.weight"]
        theirs |= {"model.embed_tokens.weight": both, "lm_head.weight": both}
    for key, tensor in adapter.tensors.items():
        assert tensor.grad is not None
        order = adapter.orders.get(key)
        mine = tensor.grad if order is None else tensor.grad.index_select(0, order.argsort())
        assert difference(mine, theirs[key]) < 1e-4, key


@pytest.mark.trap(38)
def test_a_fused_weight_is_its_parts(tmp_path: Path) -> None:
    """Phi-3 and the same numbers as a Llama: one A for query, key and value, each with its part of B."""
    shape = {"sliding_window": None, "num_key_value_heads": 2, "head_dim": 6}
    fused = make_tiny(tmp_path / "fused", "phi3", **shape)
    make_tiny(tmp_path / "twin", "llama", num_key_value_heads=2, head_dim=6)
    theirs = fused.hf.state_dict()
    rows, parts = (
        {"qkv_proj": (36, 12, 12), "gate_up_proj": (52, 52)},
        {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        },
    )
    split = {}
    for name, value in theirs.items():
        kind = name.split(".")[-2]
        pieces = zip(parts[kind], value.split(rows[kind]), strict=True) if kind in rows else [(kind, value)]
        split |= {name.replace(kind, part): piece.contiguous() for part, piece in pieces}
    save_file(split, tmp_path / "twin" / "model.safetensors", {"format": "pt"})
    decoder = load_decoder(open_base(tmp_path / "twin"), FP32)
    adapter = adapt(fused, r=3)
    shake(adapter)
    other = new_adapter(decoder, LoraConfig(r=3, alpha=4), seed=0)[0]
    for name, value in adapter.tensors.items():
        module, kind, _ = name.rsplit(".", 2)
        last = module.split(".")[-1]
        own = parts.get(last, (last,))
        pieces = value.split(rows[last]) if kind == "lora_B" and last in rows else [value] * len(own)
        for part, piece in zip(own, pieces, strict=True):
            other.take(f"{module.removesuffix(last)}{part}.{kind}.weight", piece.detach())
    other.refresh()
    for mine, twins in zip(our_logits(fused.decoder, ROWS), our_logits(decoder, ROWS), strict=True):
        assert difference(mine, twins) < 1e-5


def test_every_number_lies_in_the_flat_buffer_once(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, "qwen2")
    adapter = adapt(tiny, r=2, **EVERYTHING)
    assert adapter.flat.grad is not None
    with torch.no_grad():
        for tensor in adapter.tensors.values():
            tensor.zero_()
            assert tensor.grad is not None
            tensor.grad.fill_(1.0)
        assert not adapter.flat.any()
        for tensor in adapter.tensors.values():
            tensor.add_(1.0)
    assert bool((adapter.flat == 1).all())
    assert bool((adapter.flat.grad == 1).all())
    assert sum(t.numel() for t in adapter.tensors.values()) == adapter.parameters
    assert adapter.decaying == sum(t.numel() for t in adapter.tensors.values() if t.dim() == 2)
    starts = {name: t.storage_offset() for name, t in adapter.tensors.items()}
    for name, tensor in adapter.tensors.items():
        assert (starts[name] < adapter.decaying) == (tensor.dim() == 2), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_at_step_0_nothing_changes(family: str, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, family)
    before = our_logits(tiny.decoder, ROWS)
    settings = EVERYTHING if family != "llama" else {}
    adapter = adapt(tiny, r=5, **settings)
    for mine, base in zip(our_logits(tiny.decoder, ROWS), before, strict=True):
        assert torch.equal(mine, base)
    shake(adapter)
    assert not torch.equal(our_logits(tiny.decoder, ROWS)[0], before[0])
    tiny.decoder.adapted = False
    assert torch.equal(our_logits(tiny.decoder, ROWS)[0], before[0])
    tiny.decoder.adapted = True
    remove(tiny.decoder)
    assert torch.equal(our_logits(tiny.decoder, ROWS)[0], before[0])


def test_the_beginning_is_a_function_of_seed_and_name(tmp_path: Path) -> None:
    """A in +-1/sqrt(inputs), B zero; what else is adapted makes no difference."""
    tiny = make_tiny(tmp_path)
    alone = adapt(tiny, target_modules=["k_proj"]).tensors
    among = adapt(tiny, bias="all", modules_to_save=["norm"]).tensors
    other = adapt(tiny, target_modules=["k_proj"], seed=4).tensors
    for name, tensor in alone.items():
        assert torch.equal(tensor, among[name])
        if "lora_A" in name:
            bound = 36**-0.5
            assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound
            assert not torch.equal(tensor, other[name])
        else:
            assert not tensor.any()
    first, second = (f"model.layers.{i}.self_attn.k_proj.lora_A.weight" for i in (0, 1))
    assert not torch.equal(alone[first], alone[second])


def test_scale(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    path = "model.layers.0.mlp.up_proj"
    assert adapt(tiny, r=4, alpha=6).spec.scale(path) == 1.5
    assert adapt(tiny, r=4, alpha=6, rslora=True).spec.scale(path) == 3.0


def test_what_cannot_be_trained_in_full_is_named(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    with pytest.raises(ConfigError, match="`score`") as caught:
        adapt(tiny, modules_to_save=["score"])
    assert "embed_tokens, lm_head, input_layernorm" in str(caught.value)


@pytest.mark.trap(48)
@pytest.mark.trap(54)
def test_training_leaves_the_base_alone(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, "qwen2")
    before, files = checksum(tiny.decoder), (tmp_path / "model.safetensors").read_bytes()
    adapter = adapt(tiny, r=2, **EVERYTHING)
    start = adapter.flat.detach().clone()
    optimizer = AdamW(adapter, TrainConfig())
    for step in range(3):
        packs = [make_pack([example(row) for row in ROWS], range(len(ROWS)))]
        train_step(tiny.decoder, optimizer, packs, step=step, learning_rate=0.05)
    assert not torch.equal(adapter.flat, start)
    assert checksum(tiny.decoder) == before
    assert (tmp_path / "model.safetensors").read_bytes() == files


def masks_of(dropout: LoraDropout, step: int, rows: Any, lengths: Any, number: int) -> torch.Tensor:
    masks = dropout.for_pack(step, rows, lengths)(number, 36, sum(lengths))
    return masks(torch.ones(sum(lengths), 36))


def test_masks_do_not_depend_on_the_split() -> None:
    dropout = LoraDropout(0.25, 7, torch.float32, FP32.device)
    whole = masks_of(dropout, 5, (0, 1, 2), (4, 6, 2), 3)
    other = LoraDropout(0.25, 7, torch.float32, FP32.device)  # as after resuming: no history
    parts = [masks_of(other, 5, (row,), (n,), 3) for row, n in ((2, 2), (0, 4), (1, 6))]
    assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))


def test_masks_differ_by_step_module_row_position_and_seed() -> None:
    dropout = LoraDropout(0.5, 7, torch.float32, FP32.device)
    first = masks_of(dropout, 0, (0, 1), (3, 3), 0)
    assert len({tuple(mask) for mask in first.tolist()}) == 6
    assert not torch.equal(masks_of(dropout, 1, (0, 1), (3, 3), 0), first)
    assert not torch.equal(masks_of(dropout, 0, (0, 1), (3, 3), 1), first)
    seeded = LoraDropout(0.5, 8, torch.float32, FP32.device)
    assert not torch.equal(masks_of(seeded, 0, (0, 1), (3, 3), 0), first)
    assert torch.equal(masks_of(dropout, 0, (0, 1), (3, 3), 0), first)


def test_masks_drop_the_share_that_was_asked_for() -> None:
    dropout = LoraDropout(0.2, 7, torch.float32, FP32.device)
    mask = masks_of(dropout, 0, range(40), (64,) * 40, 0)
    assert mask.unique().tolist() == [0.0, 1.25]
    assert float((mask == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
    # A hash without structure: 2560 tokens point to about MASKS * (1 - e^(-2560/MASKS)) masks.
    picks = dropout.for_pack(0, range(40), (64,) * 40)(0, 36, 2560).picks_T
    assert len(picks.unique()) == pytest.approx(MASKS * (1 - 2.718 ** (-2560 / MASKS)), rel=0.05)


def test_gradient_with_dropout_does_not_depend_on_the_split(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    adapter = adapt(tiny, r=3, dropout=0.5)
    shake(adapter)
    assert adapter.flat.grad is not None
    dropout = LoraDropout(0.5, 7, torch.float32, FP32.device)
    examples = [example(row) for row in ROWS]
    seen = []
    for packs in (
        split_into_packs(examples, 1000),
        split_into_packs(examples, 25),
        split_into_packs(examples, 1000, together=False),
        [make_pack(examples, range(len(ROWS)))],
    ):
        adapter.flat.grad.zero_()
        trained = sum(pack.trained_tokens for pack in packs)
        for pack in packs:
            masks = dropout.for_pack(2, pack.rows, pack.lengths)
            pack_loss(tiny.decoder, pack, weight=1 / trained, dropouts=masks)[0].backward()
        seen.append(adapter.flat.grad.clone())
    for gradient in seen[1:]:
        assert difference(gradient, seen[0]) < 1e-5
    adapter.flat.grad.zero_()
    pack_loss(tiny.decoder, packs[0], weight=1 / trained)[0].backward()
    assert difference(adapter.flat.grad, seen[0]) > 1e-2


@pytest.mark.trap(55)
def test_dropout_is_off_wherever_nothing_is_trained(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    adapter = adapt(tiny, r=3, dropout=0.5)
    shake(adapter)
    pack = make_pack([example(row) for row in ROWS], range(len(ROWS)))
    first = pack_losses(tiny.decoder, pack)
    wanted = [
        F.cross_entropy(logits[1:-1], torch.tensor(row[2:]), reduction="none")
        for row, logits in zip(ROWS, our_logits(tiny.decoder, ROWS), strict=True)
    ]
    # A pack has its rows in the order of their lengths.
    assert difference(first, torch.cat([wanted[row] for row in pack.rows])) < 1e-5
    optimizer = AdamW(adapter, TrainConfig())
    dropout = LoraDropout(0.5, 7, torch.float32, FP32.device)
    trained = train_step(tiny.decoder, optimizer, [pack], step=0, learning_rate=0.0, dropout=dropout)
    assert abs(trained.loss - float(first.mean())) > 1e-3
    second = pack_losses(tiny.decoder, pack)
    assert torch.equal(first, second)
    without = make_tiny(tmp_path)
    shake(adapt(without, r=3, dropout=0.0))
    assert torch.equal(pack_losses(without.decoder, pack), second)
