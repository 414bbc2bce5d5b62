"""What a run needs, before it begins: memory by part, time, disk; what to change if it does not fit.

Read from file headers and the rows alone. Memory is counted (train/memory.py); time comes from two
layers of the model's own shape, measured on this machine, or from a speed that is stated.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch

from lorimer.bases.open import BaseFiles
from lorimer.config import QuantConfig, RunConfig
from lorimer.data.batch import StepStream
from lorimer.data.pack import make_pack, split_into_packs
from lorimer.data.template import Example
from lorimer.errors import UserError
from lorimer.lora.adapter import table_numbers
from lorimer.lora.targets import select_targets
from lorimer.machine import memory
from lorimer.model.families import read_spec, why_not_native
from lorimer.model.grow import added_ids
from lorimer.model.load import kept_kind, skeleton
from lorimer.model.spec import ModelSpec
from lorimer.train.memory import (
    Memory,
    Shape,
    count,
    head_bytes,
    parameters,
    ranks_of,
    trained_numbers,
    used_parameters,
)

# What computing again costs, as a share of a step: of forward and backward, gate and up, or a forward.
AGAIN = {"none": 0.0, "mlp": 0.17, "layers": 0.33, "offload": 0.40}
SHARE = 0.95  # of the memory there is that a run may take
# Most tokens computed at once; and below how many products no longer use the machine, so that computing
# more again is cheaper.
MICRO_BATCH_TOKENS, BUSY_TOKENS = 2048, 512
PROBE_TOKENS = 512
# A probe of more multiply-adds than this would take longer than it is worth.
PROBE_LIMIT = 2e12
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
STEPS_LOOKED_AT = 32
Measure = Callable[[Shape, int], Memory]


@dataclass(frozen=True, slots=True)
class Target:
    """The machine that is planned for: its kind, its bytes, and whether it is this one."""

    device: str
    memory: int
    here: bool


@dataclass(frozen=True, slots=True)
class Load:
    """What the rows come to, packed as training will pack them."""

    rows: int
    steps: int
    tokens: float  # of an optimizer step, as they are computed
    trained: float
    longest: int
    answered: int  # rows answered side by side by the proof
    positions: int  # of the longest of these, its answer included


@dataclass(frozen=True, slots=True)
class Plan:
    """A run as it would be. Bytes and seconds; None where it is not known."""

    spec: ModelSpec
    config: RunConfig
    target: Target
    load: Load
    shape: Shape
    micro_batch_tokens: int
    memory: Memory
    seconds: float | None
    disk: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= SHARE * self.target.memory

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.target.device,
            "memory_there": self.target.memory,
            "fits": self.fits,
            "peak": self.memory.peak,
            "parts": self.memory.parts(),
            "recompute": self.shape.recompute,
            "micro_batch_tokens": self.micro_batch_tokens,
            "steps": self.load.steps,
            "tokens": round(self.load.tokens * self.load.steps),
            "trained_tokens": round(self.load.trained * self.load.steps),
            "seconds": self.seconds,
            "disk": self.disk,
        }


def resident_bytes() -> int:
    """What this process holds now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def target_of(text: str | None, resident: int = 0) -> Target:
    """`cpu:8GB`, `cuda:24GB`, or this machine, of which `resident` bytes are ours. Raises UserError."""
    if text is None:
        return Target("cpu", memory().available + resident, here=True)
    found = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+(?:\.\d+)?)\s*([KMGT]B))?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(
            f"--device {text} is not understood (wanted: cpu or cuda, and its memory)",
            fix="For example: --device cpu:8GB or --device cuda:24GB",
        )
    device = found[1].lower()
    if found[2] is None:
        if device != "cpu":
            raise UserError(f"--device {text} says no memory", fix=f"For example: --device {device}:24GB")
        return Target("cpu", memory().available + resident, here=True)
    return Target(device, int(float(found[2]) * UNITS[found[3].upper()]), here=False)


def stream_steps(config: RunConfig, rows: int) -> int:
    """The optimizer steps of a run over so many rows."""
    return _stream(config, rows).total_steps


def _stream(config: RunConfig, rows: int) -> StepStream:
    return StepStream(
        rows=rows,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
    )


def load_of(config: RunConfig, examples: list[Example], *, steps: int, share: bool, answered: int) -> Load:
    """What the rows come to, from a sample of the steps that training will take."""
    stream = _stream(config, len(examples))
    tokens = trained = 0
    looked = range(0, steps, max(1, steps // STEPS_LOOKED_AT))
    for step in looked:
        rows = [examples[row] for row in stream.step_rows(step)]
        for pack in split_into_packs(rows, 1 << 30, together=config.data.pack, share=share):
            tokens += pack.computed_tokens
            trained += pack.trained_tokens
    longest = max(len(example.ids) for example in examples)
    return Load(
        rows=len(examples),
        steps=steps,
        tokens=tokens / len(looked),
        trained=trained / len(looked),
        longest=longest,
        answered=min(answered, config.evaluate.batch_size),
        positions=longest + config.evaluate.max_new_tokens,
    )


def stated_load(config: RunConfig) -> Load:
    """Where there are no rows to look at: every row as long as allowed, half of it trained."""
    longest = config.data.max_tokens
    steps = config.train.max_steps or 1
    tokens = longest * config.train.batch_size
    return Load(0, steps, tokens, tokens / 2, longest, 0, longest + config.evaluate.max_new_tokens)


def make_plan(
    config: RunConfig,
    base: BaseFiles,
    load: Load,
    target: Target,
    *,
    program: int,
    dtype: torch.dtype,
    tflops: float | None = None,
    probe: bool = True,
) -> Plan:
    """The run that these settings give, its rung and its tokens at once chosen as training chooses them.

    `program` is what the process holds before the base is loaded, in bytes.
    """
    if base.kind != "gguf" and (why := why_not_native(base.config)):
        from lorimer.train.plan_foreign import foreign_plan

        return foreign_plan(config, base, load, target, why, program=program, dtype=dtype, tflops=tflops)
    spec = read_spec(base.config, path=str(base.path))
    decoder = skeleton(spec, dtype)
    targets = select_targets(decoder, config.lora.target_modules, config.lora.layers)
    ranks, layers = ranks_of(targets, config.lora.r)
    shape = Shape(
        spec,
        ranks,
        layers,
        dtype.itemsize,
        config.quant,
        kept=_most_kept(base),
        optimizer=config.train.optimizer,
        tables=table_numbers(decoder, config.lora, len(added_ids(base))),
        head=head_bytes(decoder, config.lora, len(added_ids(base))),
    )
    file_bytes = sum(entry.nbytes for entry in base.tensors.values())
    measure = partial(_memory, load=load, program=program, file_bytes=file_bytes)
    rung, tokens = choose(shape, load, target.memory, config, measure)
    shape = replace(shape, recompute=rung)
    speed = None if tflops is None else tflops * 1e12
    seconds = None
    if speed is None and probe and target.here:
        seconds = _probed_seconds(shape, load, dtype)
    elif speed is not None:
        seconds = load.steps * step_flops(shape, load) / speed
    return Plan(
        spec,
        config,
        target,
        load,
        shape,
        tokens,
        measure(shape, tokens),
        None if seconds is None else seconds * (1 + AGAIN[rung]),
        disk_bytes(config, shape),
    )


def choose(shape: Shape, load: Load, there: int, config: RunConfig, measure: Measure) -> tuple[str, int]:
    """The first rung of the ladder on which the longest row fits, and the most tokens at once on it."""
    given = config.train
    rungs = ("none", "mlp", "layers") if given.recompute == "auto" else (given.recompute,)
    for rung in rungs:
        tried = replace(shape, recompute=rung)
        tokens = max(load.longest, given.micro_batch_tokens or MICRO_BATCH_TOKENS)
        least = max(load.longest, given.micro_batch_tokens or min(BUSY_TOKENS, int(load.tokens)))
        while tokens > least and measure(tried, tokens).peak > SHARE * there:
            tokens = max(least, tokens // 2)
        if measure(tried, tokens).peak <= SHARE * there:
            return rung, tokens
    return rung, max(load.longest, given.micro_batch_tokens or 0)


def packed_tokens(load: Load, most: int) -> int:
    """Tokens of the largest pack, where at most so many are computed at once."""
    return int(min(most, max(load.longest, load.tokens)))


def _memory(shape: Shape, tokens: int, *, load: Load, program: int, file_bytes: int) -> Memory:
    share = load.trained / max(1.0, load.tokens)
    tokens = packed_tokens(load, tokens)
    return count(
        shape,
        tokens=tokens,
        trained=int(tokens * share),
        program=program,
        file_bytes=file_bytes,
        rows=load.answered,
        positions=load.positions,
    )


def _most_kept(base: BaseFiles) -> str | None:
    """The GGUF type that most quantised weights of a file have."""
    counts: dict[str, int] = {}
    for name, entry in base.tensors.items():
        if base.kind == "gguf" and (kind := kept_kind(base, name)):
            counts[kind] = counts.get(kind, 0) + entry.nbytes
    return max(counts, key=lambda kind: counts[kind], default=None)


# --- what would fit -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One setting changed, and what that costs in time or otherwise."""

    text: str
    settings: dict[str, Any]
    cost: str
    slower: float = 0.0


def alternatives(
    plan: Plan, base: BaseFiles, program: int, most: int = 6
) -> list[tuple[list[Change], int]]:
    """The smallest sets of changes with which the run fits, and their peak; fewest and cheapest first."""
    found: list[tuple[list[Change], int]] = []
    changes = list(_changes(plan))
    for size in (1, 2, 3):
        for chosen in combinations(changes, size):
            keys = [key for change in chosen for key in change.settings]
            if len(set(keys)) < len(keys):
                continue
            if any({c.text for c in old} <= {c.text for c in chosen} for old, _ in found):
                continue
            tried = replan(plan, base, program, [change.settings for change in chosen])
            if tried.fits:
                found.append((list(chosen), tried.memory.peak))
        if len(found) >= most:
            break
    found.sort(key=lambda item: (len(item[0]), sum(change.slower for change in item[0])))
    return found[:most]


def replan(plan: Plan, base: BaseFiles, program: int, changes: list[dict[str, Any]]) -> Plan:
    value = plan.config.model_dump()
    load = plan.load
    for settings in changes:
        for key, setting in settings.items():
            block, _, name = key.partition(".")
            value[block][name] = setting
            if key == "data.max_tokens":
                load = replace(load, longest=min(load.longest, setting))
    config = RunConfig.model_validate(value)
    dtype = torch.bfloat16 if plan.shape.size == 2 else torch.float32
    return make_plan(config, base, load, plan.target, program=program, dtype=dtype, probe=False)


def _changes(plan: Plan) -> Iterator[Change]:
    config, longest = plan.config, plan.load.longest
    if config.train.recompute != "auto":
        yield Change("train.recompute=auto", {"train.recompute": "auto"}, "up to 33 % slower", 0.33)
    if (config.train.micro_batch_tokens or 0) > longest:
        yield Change(
            "train.micro_batch_tokens=null", {"train.micro_batch_tokens": None}, "as fast, or nearly"
        )
    if config.quant.kind == "none":
        yield Change("quant=nf4", {"quant.kind": "nf4"}, "as fast; weights a little less exact", 0.01)
        yield Change("quant=int8", {"quant.kind": "int8"}, "as fast; hardly less exact", 0.005)
    if config.quant.kind != "keep" and not config.quant.embeddings:
        yield Change("quant.embeddings=true", {"quant.embeddings": True}, "a little slower", 0.02)
    if config.train.optimizer == "adamw":
        yield Change(
            "train.optimizer=adamw_8bit", {"train.optimizer": "adamw_8bit"}, "hardly less exact", 0.01
        )
    if config.lora.r >= 16:
        r = config.lora.r // 2
        yield Change(f"lora.r={r}", {"lora.r": r}, "learns less")
    if longest > 512:
        shorter = longest // 2
        yield Change(f"data.max_tokens={shorter}", {"data.max_tokens": shorter}, "longer rows are left out")


def size_text(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def alternatives_text(others: list[tuple[list[Change], int]]) -> str:
    """What would fit, two lines each."""
    if not others:
        return "no three changes make it fit: choose a smaller base, or a larger machine"
    lines = ["it would fit with"]
    for chosen, peak in others:
        costs = ", ".join(dict.fromkeys(change.cost for change in chosen))
        lines += [f"  {' '.join(change.text for change in chosen)}", f"      {size_text(peak)}; {costs}"]
    return "\n".join(lines)


# --- time and disk --------------------------------------------------------------------------------


def step_flops(shape: Shape, load: Load) -> float:
    """Multiply-adds times two of one optimizer step: forward and input gradient of every frozen weight,
    the adapter's, attention, and the head at trained positions."""
    spec = shape.spec
    weights = 4 * used_parameters(spec)
    adapter = trained_numbers(shape) * 6
    attention = spec.layers * spec.heads * spec.head_dim * load.longest * 6
    head = 4 * spec.vocab_size * spec.hidden_size
    return load.tokens * (weights + adapter + attention) + load.trained * head


def _probed_seconds(shape: Shape, load: Load, dtype: torch.dtype) -> float | None:
    """Steps of two models of one and three layers of the true shape: a layer is half of the difference."""
    tokens = int(min(PROBE_TOKENS, max(64, load.tokens)))
    part = replace(load, tokens=tokens, trained=tokens * load.trained / max(1.0, load.tokens))
    if step_flops(replace(shape, spec=shape.spec.first_layers(3)), part) > PROBE_LIMIT:
        return None
    one, three = (_layers_seconds(shape, layers, tokens, part.trained, dtype) for layers in (1, 3))
    per_layer = max(1e-6, (three - one) / 2)
    step = (one + (shape.spec.layers - 1) * per_layer) * load.tokens / tokens
    # The update: a pass over the flat buffer and its state.
    return load.steps * (step + trained_numbers(shape) * 28 / 1e10)


def _layers_seconds(shape: Shape, layers: int, tokens: int, trained: float, dtype: torch.dtype) -> float:
    """The quickest of three passes, forward and backward, of a random model with so many layers."""
    import numpy as np

    from lorimer.config import LoraConfig
    from lorimer.lora.adapter import new_adapter
    from lorimer.model.loss import pack_loss
    from lorimer.model.random import random_decoder

    spec = shape.spec.first_layers(layers)
    quant = shape.quant if shape.quant.kind != "keep" else QuantConfig(kind="int8")
    decoder = random_decoder(spec, dtype, quant)
    here = {path for layer in range(layers) for group in spec.groups(layer) for path in group.paths}
    names = [path for path, n in shape.layers.items() if n and path in here]
    new_adapter(decoder, LoraConfig(r=max(shape.ranks.values()), target_modules=names), seed=0)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, tokens).astype(np.int32)
    marks = np.arange(tokens) >= tokens - max(1, int(trained))
    marks[0] = False
    pack = make_pack([Example(ids, marks, "probe")], [0], trim=True)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        loss, _ = pack_loss(decoder, pack, weight=1.0)
        loss.backward()
        best = min(best, time.perf_counter() - began)
    return best


def disk_bytes(config: RunConfig, shape: Shape) -> dict[str, int]:
    """Checkpoints as they are kept, the adapter, and what exports take."""
    from lorimer.train.memory import FLOAT, STATE

    numbers = trained_numbers(shape)
    adapter = FLOAT * numbers
    checkpoint = adapter + int(STATE[config.train.optimizer] * numbers)
    kept = 0 if config.output.save_every == "never" else config.output.keep + 1
    return {
        "checkpoints": kept * checkpoint,
        "adapter": adapter,
        "merged in 16 bits": 2 * parameters(shape.spec),
        "GGUF in Q4_K_M": int(parameters(shape.spec) * 0.6),
    }
