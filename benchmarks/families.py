"""Families on native kernels beside SmolLM2's shape: how much of the arithmetic a second each of them does.

    python benchmarks/families.py                 every family, three rounds
    python benchmarks/families.py gemma2 falcon   some of them
    python benchmarks/families.py --quick

Each family is a random model of SmolLM2's width with so many layers that a step costs about the same
arithmetic. Steps alternate with those of the SmolLM2 shape, in one process; what is printed is the median
of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import process
import report
from lorimer.config import LoraConfig, QuantConfig
from lorimer.data.pack import make_pack
from lorimer.data.template import Example
from lorimer.lora.adapter import new_adapter
from lorimer.model.decoder import Decoder
from lorimer.model.families import read_spec
from lorimer.model.loss import pack_loss
from lorimer.model.random import random_decoder
from lorimer.model.spec import ModelSpec
from lorimer.train.memory import used_parameters

VOCABULARY, WIDTH, INNER, HEADS = 49_152, 576, 1536, 9
LAYERS = 8  # of the SmolLM2 shape

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
WINDOWS = {"sliding_window": 256}
PLAIN = {"intermediate_size": 4 * WIDTH, "ffn_dim": 4 * WIDTH}
DIFFERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOWS,
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": WINDOWS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": WINDOWS,
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "cohere": {},
    "cohere2": WINDOWS,
    "stablelm": {},
    "starcoder2": PLAIN,
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 4096},
    "gpt_neox": PLAIN,
    "opt": PLAIN,
    "falcon": {"multi_query": True},
    "glm4": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": INNER // 2},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": INNER // 4},
}


def spec_of(family: str) -> ModelSpec:
    """The family at SmolLM2's width, with layers for as much arithmetic a token."""
    spec = read_spec(COMMON | DIFFERS[family] | {"model_type": family}, path=family)
    wanted = used_parameters(read_spec(COMMON | {"model_type": "llama"}, path="llama"))
    layers = max(1, round(LAYERS * wanted / used_parameters(spec)))
    if layers <= spec.layers:
        return spec.first_layers(layers)
    more = {"num_hidden_layers": layers, "n_layer": layers}
    return read_spec(COMMON | DIFFERS[family] | {"model_type": family} | more, path=family)


def made(family: str, dtype: torch.dtype) -> Decoder:
    decoder = random_decoder(spec_of(family), dtype, QuantConfig())
    new_adapter(decoder, LoraConfig(r=16), seed=0)
    return decoder


def arithmetic(spec: ModelSpec, tokens: int) -> float:
    """Multiply-adds times two of a step's frozen products: forward and input gradient, and the head."""
    head = spec.vocab_size * spec.hidden_size
    return 4.0 * tokens * (used_parameters(spec) + head)


def step_seconds(decoder: Decoder, tokens: int) -> float:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens).astype(np.int32)
    pack = make_pack([Example(ids, np.arange(tokens) > 0, "made")], [0], trim=True)
    began = time.perf_counter()
    loss, _ = pack_loss(decoder, pack, weight=1.0 / tokens)
    loss.backward()
    return time.perf_counter() - began


def rounds(family: str, args: argparse.Namespace, dtype: torch.dtype) -> list[tuple[float, float]]:
    """GFLOP/s of the family and of SmolLM2's shape, round by round."""
    mine, base = made(family, dtype), made("llama", dtype)
    pairs = []
    for number in range(1 + args.rounds):
        rates = []
        for decoder in (mine, base):
            best = min(step_seconds(decoder, args.tokens) for _ in range(args.steps))
            rates.append(arithmetic(decoder.spec, args.tokens) / best / 1e9)
        if number:  # the first warms up
            pairs.append((rates[0], rates[1]))
    return pairs


def table(everything: dict[str, Any]) -> str:
    settings = everything["settings"]
    lines = [
        "",
        f"rows of {settings['tokens']} tokens, r 16, all linear layers, {settings['dtype']}, "
        f"{settings['threads']} threads",
        f"{'family':<14}{'layers':>8}{'GFLOP/s':>10}{'SmolLM2':>10}{'ratio':>8}   least to most",
    ]
    for family, facts in everything["families"].items():
        ratios = [mine / base for mine, base in facts["rates"]]
        mine, base = (statistics.median(rates) for rates in zip(*facts["rates"], strict=True))
        lines.append(
            f"{family:<14}{facts['layers']:>8}{mine:>10.0f}{base:>10.0f}{statistics.median(ratios):>8.2f}"
            f"   {min(ratios):.2f} to {max(ratios):.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Families beside SmolLM2's shape at equal arithmetic.")
    parser.add_argument("families", nargs="*", choices=[*DIFFERS, []], default=[])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round, of which the best counts")
    parser.add_argument("--threads", type=int, default=process.cores())
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quick", action="store_true", help="two families, one round")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    chosen = args.families or list(DIFFERS)
    if args.quick:
        chosen, args.rounds, args.steps, args.tokens = chosen[:2], 1, 1, 64
    torch.set_num_threads(args.threads)
    machine = report.machine(args.threads)
    print(report.machine_text(machine), flush=True)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    found: dict[str, Any] = {}
    for family in chosen:
        found[family] = {"layers": spec_of(family).layers, "rates": rounds(family, args, dtype)}
        print(f"{family}: {found[family]['rates'][-1][0]:.0f} GFLOP/s", flush=True)
    settings = {name: getattr(args, name) for name in ("tokens", "threads", "dtype", "rounds", "steps")}
    everything = {"kind": "families", "machine": machine, "settings": settings, "families": found}
    print(table(everything))
    process.write_json(args.out, everything)


if __name__ == "__main__":
    main()
