"""The plan of a base that transformers computes: what its modules keep, counted without numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from lorimer.bases.open import BaseFiles
from lorimer.config import RunConfig
from lorimer.lora.adapter import table_numbers
from lorimer.lora.layers import LoraSpec, inject
from lorimer.lora.targets import Target, select_targets
from lorimer.model.foreign import shape_of
from lorimer.model.foreign_decoder import PADDING, ForeignDecoder
from lorimer.model.grow import added_ids
from lorimer.quant.linear import DenseLinear
from lorimer.train.memory import FLOAT, PREFLIGHT_TOKENS, STATE, TOUCHED, Memory, Shape, stored_bytes
from lorimer.train.plan import AGAIN, Load, Plan, choose, packed_tokens
from lorimer.train.plan import Target as Machine

# Rows that are computed without numbers, to see how what is kept grows with a row.
LENGTHS = (64, 128)
# Where these rows cannot be computed so: numbers kept for a token and a layer, in hidden sizes.
KEPT = 40
# What importing transformers adds to the program.
LIBRARY = 160_000_000


def foreign_plan(
    config: RunConfig,
    base: BaseFiles,
    load: Load,
    machine: Machine,
    why: str,
    *,
    program: int,
    dtype: torch.dtype,
    tflops: float | None,
) -> Plan:
    """As `make_plan`, which says what the arguments are. The time is known only with a stated speed."""
    decoder = shape_of(base, why, dtype)
    targets = select_targets(decoder, config.lora.target_modules, config.lora.layers)
    shape = Shape(decoder.spec, {}, {}, dtype.itemsize, config.quant, optimizer=config.train.optimizer)
    numbers = sum(config.lora.r * (t.group.inputs + t.outputs) for t in targets)
    numbers += table_numbers(decoder, config.lora, len(added_ids(base)))
    kept = _kept(decoder, targets, config.lora.r)
    file_bytes = sum(entry.nbytes for entry in base.tensors.values())
    measure = partial(
        _memory,
        decoder=decoder,
        numbers=numbers,
        kept=kept,
        load=load,
        program=program + LIBRARY,
        file_bytes=file_bytes,
    )
    rung, tokens = choose(shape, load, machine.memory, config, measure)
    shape = replace(shape, recompute=rung)
    work = load.steps * load.tokens * (4 * decoder.shape.numbers + 6 * numbers)
    return Plan(
        decoder.spec,
        config,
        machine,
        load,
        shape,
        tokens,
        measure(shape, tokens),
        None if tflops is None else work / (tflops * 1e12) * (1 + AGAIN[rung]),
        _disk(config, decoder, numbers),
    )


def _kept(decoder: ForeignDecoder, targets: list[Target], r: int) -> tuple[float, float]:
    """Bytes that a row of n tokens keeps for its backward pass are one * n + other * n * n."""
    paths = [target.path for target in targets]
    inject(decoder, targets, LoraSpec(dict.fromkeys(paths, r), dict.fromkeys(paths, 1.0)))
    short, long = LENGTHS
    try:
        few, many = (_row_bytes(decoder, length) for length in LENGTHS)
    except Exception:  # code that looks at numbers cannot go without them
        spec = decoder.spec
        return float(KEPT * spec.hidden_size * spec.layers * decoder.dtype.itemsize), 0.0
    square = max(0.0, (many / long - few / short) / (long - short))
    return few / short - square * short, square


def _row_bytes(decoder: ForeignDecoder, length: int) -> int:
    """What autograd keeps of one row of this length, weights left out."""
    frozen = [*decoder.model.parameters(), *decoder.model.buffers()]
    for group in decoder.linears:
        weight, low_rank = group.linear.weight, group.adapted and group.adapted.linear.low_rank
        frozen += [weight.weight_OI] if isinstance(weight, DenseLinear) else []
        frozen += [low_rank.down_RI, low_rank.up_OR] if low_rank else []
    known = {tensor.untyped_storage()._cdata for tensor in frozen}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    ids_BS = torch.zeros((1, length), dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = decoder.run(ids_BS, torch.zeros(1, dtype=torch.int64, device="meta"))
    del states
    return sum(storage.nbytes() for storage in kept.values())


def _memory(
    shape: Shape,
    tokens: int,
    *,
    decoder: ForeignDecoder,
    numbers: int,
    kept: tuple[float, float],
    load: Load,
    program: int,
    file_bytes: int,
) -> Memory:
    spec, size = decoder.spec, shape.size
    tokens, longest = packed_tokens(load, tokens), load.longest
    trained = int(tokens * load.trained / max(1.0, load.tokens))

    def row_bytes(count: int, length: int) -> int:
        return int(count * (kept[0] + kept[1] * length) * (1 + PADDING / 2))

    alone = shape.recompute in ("layers", "offload")
    layer = row_bytes(tokens, longest) // max(1, spec.layers)
    logits = 0 if decoder.product_only else 3 * FLOAT * spec.vocab_size
    linear = sum(group.rows[0] * group.inputs for group in decoder.linears)
    stored = sum(stored_bytes(group.rows[0], group.inputs, shape) for group in decoder.linears)
    answers = load.answered * (
        2 * spec.layers * load.positions * spec.hidden_size * size + 12 * spec.vocab_size
    )
    some = min(tokens, PREFLIGHT_TOKENS)
    return Memory(
        program=program + TOUCHED,
        weights=stored + (decoder.shape.numbers - linear) * size,
        adapter=(FLOAT + size) * numbers,
        gradients=FLOAT * numbers,
        optimizer=int(STATE[shape.optimizer] * numbers),
        activations=row_bytes(longest, longest) if alone else row_bytes(tokens, longest),
        workspace=layer + trained * (6 * spec.hidden_size * size + logits),
        preflight=FLOAT * numbers + row_bytes(some, some // 4) + some // 2 * logits,
        evaluation=max(layer + trained * logits, answers),
        # transformers has the whole model in memory before a weight is quantised.
        loading=file_bytes + (linear * size - stored if shape.quant.kind != "none" else 0),
        merging=program + TOUCHED + 2 * FLOAT * decoder.shape.numbers,
    )


def _disk(config: RunConfig, decoder: ForeignDecoder, numbers: int) -> dict[str, int]:
    kept = 0 if config.output.save_every == "never" else config.output.keep + 1
    return {
        "checkpoints": kept * (FLOAT * numbers + int(STATE[config.train.optimizer] * numbers)),
        "adapter": FLOAT * numbers,
        "merged in 16 bits": 2 * decoder.shape.numbers,
    }
