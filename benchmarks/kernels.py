"""Each kernel's GFLOP/s or GB/s beside torch's own operation, and beside the peak measured in the same run.

    python benchmarks/kernels.py                      all cases, on all threads
    python benchmarks/kernels.py --only head --threads 1
    LORIMER_ISA=avx2 python benchmarks/kernels.py     with the kernels of one instruction set

A case is one row: what lorimer runs, what torch offers for it (the faster, where it offers two), and the
operations or bytes that the work needs at least. Both sides get the same numbers, and their results are
compared before anything is timed. Shapes are those of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import process
import report
from lorimer.config import QuantConfig, TrainConfig
from lorimer.kernels import dispatch, products, reference
from lorimer.kernels.codes import BLOCKS
from lorimer.kernels.dispatch import HeadNorms, Heads, Norm
from lorimer.kernels.native import attention as native_attention
from lorimer.kernels.native import elementwise
from lorimer.kernels.native.library import REFERENCE, usable, using
from lorimer.lora.layers import Adapter, LoraSpec
from lorimer.quant.gguf_encode import encode
from lorimer.quant.linear import QuantLinear
from lorimer.quant.storage import keep, quantise
from lorimer.train.optimizer import AdamW

# Letters: T tokens, H hidden, N query heads, K key/value heads, D head size, B rows, L tokens of a row.
HIDDEN, INNER, VOCABULARY = 576, 1536, 49152
HEADS = Heads(9, 3, 64)
ADAPTER = 4_884_480  # parameters at r 16 on all linear layers
PRODUCTS = {"qkv": (576, 960), "output": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
TOKENS, POSITIONS = (64, 512, 2048), (128, 512, 2048)
ROWS = {"16 rows of 60": (16, 60), "1 row of 2048": (1, 2048)}
INPUTS, OUTPUTS = 4096, 4096  # of a weight to be quantised: more than the caches hold
QUANTISED = ("nf4", "int8", "Q8_0", "Q4_K", "Q6_K")
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Work = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size. `flops` or `bytes` is what the work needs at least."""

    kernel: str
    size: str
    dtype: str
    ours: Work
    torchs: Sequence[Work]
    flops: float = 0.0
    bytes: float = 0.0
    compared: bool = True  # both return what they computed


def matmul_cases(dtype: str) -> Iterator[Case]:
    kind = TYPES[dtype]
    for name, (inputs, outputs) in PRODUCTS.items():
        weight_OI = torch.randn(outputs, inputs).mul_(inputs**-0.5).to(kind)
        for tokens in TOKENS:
            states_TI, grad_TO = torch.randn(tokens, inputs).to(kind), torch.randn(tokens, outputs).to(kind)
            size = f"{name} {inputs}x{outputs}, {tokens} tokens"
            flops = 2.0 * tokens * inputs * outputs
            yield Case(
                *("matmul forward", size, dtype),
                ours=lambda x=states_TI, w=weight_OI: products.forward(x, w),
                torchs=[lambda x=states_TI, w=weight_OI: F.linear(x, w)],
                flops=flops,
            )
            yield Case(
                *("matmul input gradient", size, dtype),
                ours=lambda g=grad_TO, w=weight_OI: products.input_grad(g, w),
                torchs=[lambda g=grad_TO, w=weight_OI: g @ w],
                flops=flops,
            )


def quantised_cases(dtype: str) -> Iterator[Case]:
    """Products of a weight that is decoded inside; torch gets the same weight already decoded."""
    kind = TYPES[dtype]
    inputs, outputs = PRODUCTS["down"]
    weight_OI = torch.randn(outputs, inputs).mul_(inputs**-0.5)
    for name in QUANTISED:
        if name in BLOCKS:
            part = keep(encode(weight_OI, name), name, (outputs, inputs), None)
        else:
            part = quantise(lambda: iter([weight_OI]), (outputs, inputs), QuantConfig(kind=name))
        weight = QuantLinear([part], kind)
        dense_OI = weight.dequantise(kind)
        for tokens in TOKENS:
            states_TI, grad_TO = torch.randn(tokens, inputs).to(kind), torch.randn(tokens, outputs).to(kind)
            size = f"{name} {inputs}x{outputs}, {tokens} tokens"
            flops = 2.0 * tokens * inputs * outputs
            yield Case(
                *("quantised forward", size, dtype),
                ours=lambda x=states_TI, w=weight: w.forward(x),
                torchs=[lambda x=states_TI, w=dense_OI: F.linear(x, w)],
                flops=flops,
            )
            yield Case(
                *("quantised gradient", size, dtype),
                ours=lambda g=grad_TO, w=weight: w.input_grad(g),
                torchs=[lambda g=grad_TO, w=dense_OI: g @ w],
                flops=flops,
            )


def quantiser_cases(dtype: str) -> Iterator[Case]:
    """A weight into its storage; torch does the same in its own words. Bytes: numbers in, codes out."""
    weight_OI = torch.randn(OUTPUTS, INPUTS).mul_(INPUTS**-0.5).to(TYPES[dtype])
    for name in ("nf4", "fp4", "int8"):
        quant = QuantConfig(kind=name)

        def ours(quant: QuantConfig = quant) -> Tensor:
            return quantise(lambda: iter([weight_OI]), (OUTPUTS, INPUTS), quant).data

        def theirs(ours: Callable[[], Tensor] = ours) -> Tensor:
            with using(REFERENCE):
                return ours()

        # int8 reads twice: columns first.
        read = weight_OI.nbytes * (2 if name == "int8" else 1)
        yield Case(
            *("quantiser", f"{name} {INPUTS}x{OUTPUTS}", dtype),
            ours=ours,
            torchs=[theirs],
            bytes=read + ours().nbytes,
        )


def head_cases(dtype: str) -> Iterator[Case]:
    """The loss and its gradient to the hidden states; the head is frozen."""
    head_VH = torch.randn(VOCABULARY, HIDDEN).mul_(HIDDEN**-0.5).to(TYPES[dtype])
    for positions, cap in [*((positions, 0.0) for positions in POSITIONS), (512, 30.0)]:
        hidden_MH = torch.randn(positions, HIDDEN).to(TYPES[dtype]).requires_grad_()
        labels_M = torch.randint(VOCABULARY, (positions,))

        def ours(hidden: Tensor = hidden_MH, labels: Tensor = labels_M, cap: float = cap) -> Any:
            loss, _ = dispatch.head_loss(hidden, head_VH, labels, weight=1.0 / len(labels), softcap=cap)
            return loss.detach(), torch.autograd.grad(loss, hidden)[0]

        def theirs(hidden: Tensor = hidden_MH, labels: Tensor = labels_M, cap: float = cap) -> Any:
            logits = F.linear(hidden, head_VH).float()
            loss = F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, labels)
            return loss.detach(), torch.autograd.grad(loss, hidden)[0]

        size = f"{positions} trained positions, " + (f"cap {cap:g}" if cap else f"{VOCABULARY} tokens")
        flops = 4.0 * positions * HIDDEN * VOCABULARY
        yield Case("loss head, both ways", size, dtype, ours, [theirs], flops=flops)


def attention_cases(dtype: str) -> Iterator[Case]:
    for name, (rows, length) in ROWS.items():
        stacked_TS = torch.randn(rows * length, sum(HEADS[:2]) * 64 + HEADS.key_value * 64).to(TYPES[dtype])
        states = HEADS.parts(stacked_TS)
        grids = [_grid(part, rows).contiguous().requires_grad_() for part in states]
        grad_TND = torch.randn(rows * length, HEADS.query, HEADS.size).to(TYPES[dtype])
        grad_BNLD = _grid(grad_TND, rows).contiguous()
        outputs = [_gqa(*grids), _repeated(*grids)]
        pairs = rows * length * (length + 1) / 2
        flops = 4.0 * HEADS.query * HEADS.size * pairs
        forward, backward = _our_attention(states, grad_TND, rows, length)
        yield Case(
            *("attention forward", name, dtype, forward),
            torchs=[lambda g=grids: _flat(_gqa(*g)), lambda g=grids: _flat(_repeated(*g))],
            flops=flops,
        )
        yield Case(
            *("attention backward", name, dtype, backward),
            torchs=[
                lambda o=output, g=grids, u=grad_BNLD: [
                    _flat(part) for part in torch.autograd.grad(o, g, u, retain_graph=True)
                ]
                for output in outputs
            ],
            flops=2.5 * flops,
        )


def _our_attention(
    states: tuple[Tensor, Tensor, Tensor], grad_TND: Tensor, rows: int, length: int
) -> tuple[Work, Work]:
    """Forward and backward over a pack of equal rows: native, or the reference where it is not there."""
    scale = HEADS.size**-0.5
    if usable(grad_TND) and native_attention.takes(HEADS.size):
        offsets = torch.arange(0, rows * length + 1, length)
        out, lse = native_attention.forward(*states, offsets, 0, scale=scale)
        return (
            lambda: native_attention.forward(*states, offsets, 0, scale=scale)[0],
            lambda: HEADS.parts(
                native_attention.backward(grad_TND, *states, out, lse, offsets, 0, scale=scale)
            ),
        )
    grids = [_grid(part, rows) for part in states]
    grad = _grid(grad_TND, rows)
    output = reference.causal_attention(*grids, scale=scale, window=None)
    return (
        lambda: _flat(reference.causal_attention(*grids, scale=scale, window=None)),
        lambda: [
            _flat(part)
            for part in reference.causal_attention_backward(grad, *grids, output, scale=scale, window=None)
        ],
    )


def _grid(states_TND: Tensor, rows: int) -> Tensor:
    return states_TND.unflatten(0, (rows, -1)).transpose(1, 2)


def _flat(grid_BNLD: Tensor) -> Tensor:
    return grid_BNLD.transpose(1, 2).flatten(0, 1)


def _gqa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As transformers does it where grouped queries are not asked for."""
    per = HEADS.query // HEADS.key_value
    key, value = key.repeat_interleave(per, 1), value.repeat_interleave(per, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def pointwise_cases(dtype: str) -> Iterator[Case]:
    """Norm, rotation and gated unit: bytes are those of their inputs and outputs, read or written once."""
    tokens, kind = 2048, TYPES[dtype]
    each = torch.empty(0, dtype=kind).element_size()
    hidden_TH, grad_TH = torch.randn(tokens, HIDDEN).to(kind), torch.randn(tokens, HIDDEN).to(kind)
    kernels: Any = elementwise if usable(hidden_TH) else reference
    weight_H = torch.rand(HIDDEN) + 0.5
    norm, narrow_H = Norm(weight_H, 1e-5), weight_H.to(kind)
    leaf_TH = hidden_TH.clone().requires_grad_()
    normed_TH = F.rms_norm(leaf_TH, (HIDDEN,), narrow_H, 1e-5)
    _, rstd_T1 = kernels.rms_norm(hidden_TH, weight_H, 1e-5)
    size = f"{tokens} tokens of {HIDDEN}"
    yield Case(
        *("RMSNorm forward", size, dtype),
        ours=lambda: dispatch.normed(hidden_TH, norm),
        torchs=[lambda: F.rms_norm(hidden_TH, (HIDDEN,), narrow_H, 1e-5)],
        bytes=2.0 * each * tokens * HIDDEN,
    )
    yield Case(
        *("RMSNorm backward", size, dtype),
        ours=lambda: kernels.rms_norm_backward(grad_TH, hidden_TH, rstd_T1, weight_H, weight_grad=False)[0],
        torchs=[lambda: torch.autograd.grad(normed_TH, leaf_TH, grad_TH, retain_graph=True)[0]],
        bytes=3.0 * each * tokens * HIDDEN,
    )
    yield from _more_norms(hidden_TH, grad_TH, norm, dtype)
    stacked, grad_TI = torch.randn(tokens, 2 * INNER).to(kind), torch.randn(tokens, INNER).to(kind)
    leaf = stacked.clone().requires_grad_()
    unit_TI = _swiglu(leaf)
    size = f"{tokens} tokens of {INNER}"
    yield Case(
        *("SwiGLU forward", size, dtype),
        ours=lambda: kernels.gated(stacked, "silu"),
        torchs=[lambda: _swiglu(stacked)],
        bytes=3.0 * each * tokens * INNER,
    )
    yield Case(
        *("SwiGLU backward", size, dtype),
        ours=lambda: kernels.gated_backward(grad_TI, stacked, "silu")[0],
        torchs=[lambda: torch.autograd.grad(unit_TI, leaf, grad_TI, retain_graph=True)[0]],
        bytes=5.0 * each * tokens * INNER,
    )
    query_TND = torch.randn(tokens, HEADS.query, HEADS.size).to(kind)
    angle_TF = torch.rand(tokens, HEADS.size // 2) * 2 * math.pi
    cos_TF, sin_TF = angle_TF.cos().to(kind), angle_TF.sin().to(kind)
    cos_T1D, sin_T1D = (torch.cat([half, half], -1).unsqueeze(1) for half in (cos_TF, sin_TF))
    yield Case(
        *("rotary", f"{tokens} tokens of {HEADS.query} x {HEADS.size}", dtype),
        ours=lambda: dispatch.rotate(query_TND, cos_TF, sin_TF),
        torchs=[lambda: query_TND * cos_T1D + _half_turned(query_TND) * sin_T1D],
        bytes=2.0 * each * query_TND.numel(),
    )


def _more_norms(hidden_TH: Tensor, grad_TH: Tensor, norm: Norm, dtype: str) -> Iterator[Case]:
    """What families beyond Llama's need: LayerNorm, sums onto the residual, norms of heads, GELU."""
    kernels: Any = elementwise if usable(hidden_TH) else reference
    (tokens, _), kind, each = hidden_TH.shape, hidden_TH.dtype, hidden_TH.element_size()
    size, moved = f"{tokens} tokens of {HIDDEN}", float(hidden_TH.nbytes)
    weight_H, bias_H = norm.weight_H, torch.randn(HIDDEN)
    narrow_H, narrow_bias_H = weight_H.to(kind), bias_H.to(kind)
    layer = Norm(narrow_H.float(), norm.eps, layer=True, bias_H=narrow_bias_H.float())
    _, facts_T2 = kernels.layer_norm(hidden_TH, layer.weight_H, layer.bias_H, norm.eps)
    leaf_TH = hidden_TH.clone().requires_grad_()
    normed_TH = F.layer_norm(leaf_TH, (HIDDEN,), narrow_H, narrow_bias_H, norm.eps)
    yield Case(
        *("LayerNorm forward", size, dtype),
        ours=lambda: dispatch.normed(hidden_TH, layer),
        torchs=[lambda: F.layer_norm(hidden_TH, (HIDDEN,), narrow_H, narrow_bias_H, norm.eps)],
        bytes=2 * moved,
    )
    yield Case(
        *("LayerNorm backward", size, dtype),
        ours=lambda: kernels.layer_norm_backward(
            grad_TH, hidden_TH, facts_T2, layer.weight_H, weight_grad=False
        )[0],
        torchs=[lambda: torch.autograd.grad(normed_TH, leaf_TH, grad_TH, retain_graph=True)[0]],
        bytes=3 * moved,
    )
    yield Case(
        *("RMSNorm onto residual", size, dtype),
        ours=lambda: dispatch.add_normed(grad_TH, hidden_TH, norm),
        torchs=[lambda: grad_TH + F.rms_norm(hidden_TH, (HIDDEN,), narrow_H, norm.eps)],
        bytes=3 * moved,
    )
    yield Case(
        *("scaled onto residual", size, dtype),
        ours=lambda: dispatch.add_scaled(grad_TH, hidden_TH, 0.22),
        torchs=[lambda: torch.add(grad_TH, hidden_TH, alpha=0.22)],
        bytes=3 * moved,
    )
    weight_D = torch.rand(HEADS.size) + 0.5
    head_norm, narrow_D = Norm(weight_D, norm.eps), weight_D.to(kind)
    stacked_TS = (
        torch.randn(tokens, (HEADS.query + 2 * HEADS.key_value) * HEADS.size).to(kind).requires_grad_()
    )
    grad_TS = torch.randn(stacked_TS.shape).to(kind)
    ours_TS = dispatch.norm_heads(stacked_TS, HEADS, HeadNorms(head_norm, head_norm))
    theirs_TS = _heads_normed(stacked_TS, narrow_D, norm.eps)
    size = f"{tokens} tokens of {stacked_TS.shape[1]}"
    yield Case(
        *("head norms forward", size, dtype),
        ours=lambda: dispatch.norm_heads(stacked_TS, HEADS, HeadNorms(head_norm, head_norm)),
        torchs=[lambda: _heads_normed(stacked_TS, narrow_D, norm.eps)],
        bytes=2.0 * stacked_TS.nbytes,
    )
    yield Case(
        *("head norms backward", size, dtype),
        ours=lambda: torch.autograd.grad(ours_TS, stacked_TS, grad_TS, retain_graph=True)[0],
        torchs=[lambda: torch.autograd.grad(theirs_TS, stacked_TS, grad_TS, retain_graph=True)[0]],
        bytes=3.0 * stacked_TS.nbytes,
    )
    inner_TI, grad_TI = (torch.randn(tokens, INNER).to(kind) for _ in range(2))
    leaf_TI = inner_TI.clone().requires_grad_()
    unit_TI = F.gelu(leaf_TI, approximate="tanh")
    size = f"{tokens} tokens of {INNER}"
    yield Case(
        *("GELU forward", size, dtype),
        ours=lambda: kernels.activate(inner_TI, "gelu_tanh"),
        torchs=[lambda: F.gelu(inner_TI, approximate="tanh")],
        bytes=2.0 * each * tokens * INNER,
    )
    yield Case(
        *("GELU backward", size, dtype),
        ours=lambda: kernels.activate_backward(grad_TI, inner_TI, "gelu_tanh")[0],
        torchs=[lambda: torch.autograd.grad(unit_TI, leaf_TI, grad_TI, retain_graph=True)[0]],
        bytes=3.0 * each * tokens * INNER,
    )


def _heads_normed(stacked_TS: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    query, key, value = HEADS.parts(stacked_TS)
    parts = [F.rms_norm(part, (HEADS.size,), weight_D, eps) for part in (query, key)]
    return torch.cat([part.flatten(1) for part in (*parts, value)], 1)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate_TI, up_TI = gate_up.chunk(2, -1)
    return F.silu(gate_TI) * up_TI


def _half_turned(states: Tensor) -> Tensor:
    left, right = states.chunk(2, -1)
    return torch.cat([-right, left], -1)


def adamw_cases(dtype: str) -> Iterator[Case]:
    """Clipping by the global norm, the update, and clearing the gradients. Always in float32."""
    if dtype != "fp32":
        return
    flat = torch.nn.Parameter(torch.randn(ADAPTER))
    flat.grad = torch.zeros_like(flat)
    leaf = flat.data.view(-1, 64).requires_grad_()
    leaf.grad = flat.grad.view(-1, 64)
    ours = AdamW(Adapter(LoraSpec({}, {}), flat, {"all": leaf}), TrainConfig())
    param = torch.nn.Parameter(torch.randn(ADAPTER))
    param.grad = torch.zeros_like(param)
    optimizer = torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0, fused=True)

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    yield Case(
        *("AdamW", f"{ADAPTER / 1e6:.1f} M parameters", dtype),
        ours=lambda: ours.step(1e-4),
        torchs=[theirs],
        # The gradient for its norm; then parameter, gradient and two moments, read and written.
        bytes=(1 + 2 * 4) * 4.0 * ADAPTER,
        compared=False,
    )


GROUPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "matmul": matmul_cases,
    "quantised": quantised_cases,
    "quantiser": quantiser_cases,
    "head": head_cases,
    "attention": attention_cases,
    "pointwise": pointwise_cases,
    "adamw": adamw_cases,
}


def seconds(work: Work, least: float) -> float:
    """Seconds of one call, from as many calls as take `least` seconds together."""
    calls = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < least:
        work()
        calls += 1
    return passed / calls


def measure(case: Case, rounds: int, least: float) -> dict[str, Any]:
    """Medians over rounds in which lorimer and torch take turns, and their ratio round by round."""
    apart = _apart(case.ours(), case.torchs[0]()) if case.compared else None
    ours: list[float] = []
    theirs: list[float] = []
    seconds(case.ours, least / 2)
    torchs = case.torchs
    if len(torchs) > 1:
        torchs = [min(torchs, key=lambda work: seconds(work, least / 2))]
    for _ in range(rounds):
        ours.append(seconds(case.ours, least))
        theirs.append(seconds(torchs[0], least))
    amount = (case.flops or case.bytes) / 1e9
    return {
        "kernel": case.kernel,
        "size": case.size,
        "dtype": case.dtype,
        "unit": "GFLOP/s" if case.flops else "GB/s",
        "ours": amount / median(ours),
        "torch": amount / median(theirs),
        "microseconds": 1e6 * median(ours),
        "ratio": report.spread([their / our for our, their in zip(ours, theirs, strict=True)]),
        "apart": apart,
    }


def _apart(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest value."""
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
    return max(_difference(a.detach().float(), b.detach().float()) for a, b in pairs)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def table(everything: dict[str, Any]) -> str:
    peak, settings = everything["machine"]["peak"], everything["settings"]
    lines = [
        "",
        f"lorimer's kernels: {everything['machine']['kernels']}; {settings['threads']} threads, "
        f"median of {settings['rounds']} rounds",
        " " * 66 + f"{'lorimer':>9}{'torch':>8}{'':<9}{'us':>9}{'ratio':>7}{'of peak':>9}{'apart':>9}",
    ]
    for row in everything["cases"]:
        limit = peak.get("copy" if row["unit"] == "GB/s" else row["dtype"])
        share = f"{100 * row['ours'] / limit:.0f} %" if limit else "-"
        apart = "-" if row["apart"] is None else f"{row['apart']:.0e}"
        lines.append(
            f"{row['kernel']:<23}{row['size']:<37}{row['dtype']:<6}{row['ours']:>9.1f}{row['torch']:>8.1f} "
            f"{row['unit']:<8}{row['microseconds']:>9.0f}{row['ratio'][0]:>7.2f}{share:>9}{apart:>9}"
        )
    lines += [
        "",
        "ratio: torch's time divided by lorimer's; of peak: of the register peak, or of copying",
        "(what fits into the cache can be above it); apart: largest difference between the two results",
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="lorimer's kernels against torch's operations.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--threads", type=int, default=process.cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="how long each side runs in a round")
    parser.add_argument("--quick", action="store_true", help="one short round: does it all still run?")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.005
    if min(args.threads, args.rounds) < 1:
        parser.error("--threads and --rounds must be at least 1")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = report.machine(args.threads)
    print(report.machine_text(machine), flush=True)
    found = []
    for name in args.only:
        for dtype in args.dtypes:
            for case in GROUPS[name](dtype):
                found.append(measure(case, args.rounds, args.seconds))
                print(f"{case.kernel}, {case.size}, {dtype}: {found[-1]['ours']:.1f}", flush=True)
    settings = {name: getattr(args, name) for name in ("threads", "rounds", "seconds", "only", "dtypes")}
    everything = {"kind": "kernels", "machine": machine, "settings": settings, "cases": found}
    print(table(everything))
    process.write_json(args.out, everything)


if __name__ == "__main__":
    main()
