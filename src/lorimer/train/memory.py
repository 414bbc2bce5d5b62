"""What a run keeps in memory, counted from shapes alone; benchmarks/memory.py measures the same.

The formulas follow what kernels/dispatch.py saves for the backward pass on each rung of the ladder
(model/recompute.py), what lora/layers.py keeps for an adapter, train/optimizer.py for its state and
quant/part.py for a weight.

Letters: T tokens computed at once, M trained positions among them, H hidden, I inner.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lorimer.config import QuantConfig
from lorimer.kernels.codes import BLOCKS
from lorimer.lora.targets import Target
from lorimer.model.load import STRETCH
from lorimer.model.spec import ModelSpec

FLOAT = 4
PREFLIGHT_TOKENS = 4 * 96  # at most, of preflight's rows together
# Pages of libraries that the first step touches, and what its small tensors leave in the C library's heap.
TOUCHED = 45_000_000
# And those that PyTorch's checkpointing brings.
AGAIN_TOUCHED = 25_000_000
# Bytes of state for each trained number.
STATE = {
    "adamw": 8.0,
    "paged_adamw": 8.0,
    "adamw_8bit": 2.0 + 8 / 256,
    "lion": 4.0,
    "sgd": 4.0,
    "adafactor": 0.1,
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part. Steps hold all but the last four; the largest of activations with workspace, preflight
    and evaluation comes on top of what is held."""

    program: int  # Python, PyTorch and the tokenised rows
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    preflight: int  # what is checked before the first step
    evaluation: int
    loading: int  # beside weights, while they are read
    merging: int  # of `lorimer merge`, a process of its own

    @property
    def held(self) -> int:
        return self.program + self.weights + self.adapter + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Of the run: while loading, in a step, or while evaluating."""
        during = max(self.activations + self.workspace, self.preflight, self.evaluation)
        return max(self.program + self.weights + self.loading, self.held + during)

    def parts(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory depends on."""

    spec: ModelSpec
    ranks: dict[str, int]  # of each adapted module by its name in a layer, and how many layers have it
    layers: dict[str, int]
    size: int  # bytes of a number in activations and dense weights
    quant: QuantConfig
    kept: str | None = None  # for `keep`: the GGUF type that most weights have
    optimizer: str = "adamw"
    recompute: str = "none"

    @property
    def groups(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], int]]:
        """The stacked projections of a layer: names, rows of each, inputs."""
        spec, inner = self.spec, self.spec.intermediate_size
        return {
            "qkv": (("q_proj", "k_proj", "v_proj"), spec.qkv_rows, spec.hidden_size),
            "output": (("o_proj",), (spec.hidden_size,), spec.qkv_rows[0]),
            "gate_up": (("gate_proj", "up_proj"), (inner, inner), spec.hidden_size),
            "down": (("down_proj",), (spec.hidden_size,), inner),
        }

    def rank(self, names: tuple[str, ...]) -> int:
        """The stacked ranks of a group."""
        return sum(self.ranks.get(name, 0) for name in names)


def ranks_of(targets: list[Target], r: int) -> tuple[dict[str, int], dict[str, int]]:
    """The rank of each adapted module by its name, and how many layers have it."""
    layers: dict[str, int] = {}
    for target in targets:
        layers[target.name] = layers.get(target.name, 0) + 1
    return dict.fromkeys(layers, r), layers


def stored_bytes(rows: int, columns: int, shape: Shape) -> int:
    """One weight in its storage."""
    count, quant = rows * columns, shape.quant
    if quant.kind in ("nf4", "fp4"):
        blocks = -(-count // quant.block_size)
        return count // 2 + (blocks + FLOAT * -(-blocks // 256) if quant.double else FLOAT * blocks)
    if quant.kind == "int8":
        return count + FLOAT * rows
    if quant.kind == "keep" and shape.kept in BLOCKS and columns % BLOCKS[shape.kept][1] == 0:
        size, numbers = BLOCKS[shape.kept]
        return count // numbers * size
    return count * shape.size


def table_bytes(shape: Shape) -> int:
    """Embedding and head; one where they are tied."""
    spec = shape.spec
    tables = 1 if spec.tied_head else 2
    dense = spec.vocab_size * spec.hidden_size * shape.size
    stored = stored_bytes(spec.vocab_size, spec.hidden_size, shape)
    return tables * (stored if shape.quant.embeddings else dense)


def layer_bytes(shape: Shape) -> int:
    """The frozen weights of one layer."""
    total = FLOAT * 2 * shape.spec.hidden_size
    for _, rows, inputs in shape.groups.values():
        total += sum(stored_bytes(count, inputs, shape) for count in rows)
    return total


def trained_numbers(shape: Shape) -> int:
    """Numbers in the adapter's flat buffer: each A [r, inputs] and B [outputs, r]."""
    total = 0
    for names, rows, inputs in shape.groups.values():
        for name, count in zip(names, rows, strict=True):
            total += shape.layers.get(name, 0) * shape.ranks.get(name, 0) * (inputs + count)
    return total


def adapter_bytes(shape: Shape) -> int:
    """The float32 buffer, and the copies that products use: stacked A, and B with zeros between."""
    copies = 0
    for names, rows, inputs in shape.groups.values():
        adapted = max((shape.layers.get(name, 0) for name in names), default=0)
        copies += adapted * shape.rank(names) * (inputs + sum(rows))
    return FLOAT * trained_numbers(shape) + shape.size * copies


def token_bytes(shape: Shape, rung: str) -> int:
    """What one layer keeps of one token for its backward pass.

    The two norm inputs, query, key and value stacked, the heads' output, gate and up stacked, the input
    times A of each group; in float32 the norms' factors and attention's log sums. With head norms the
    stacked outputs are kept before and after them.
    """
    spec = shape.spec
    if rung in ("layers", "offload"):
        return spec.hidden_size * shape.size if rung == "layers" else 0
    stacked = sum(spec.qkv_rows)
    kept = 2 * spec.hidden_size + stacked + spec.qkv_rows[0]
    kept += 0 if rung == "mlp" else 2 * spec.intermediate_size
    kept += sum(shape.rank(names) for names, _, _ in shape.groups.values())
    factors = 2 + spec.heads
    if spec.qk_norm:
        kept += stacked
        factors += spec.heads + spec.kv_heads
    return kept * shape.size + factors * FLOAT


def activation_bytes(shape: Shape, tokens: int, trained: int) -> int:
    """All layers of a pack, on the shape's rung. The last goes on after attention with the trained
    positions alone, and is never computed again."""
    spec = shape.spec
    whole = token_bytes(shape, "none")
    late = (spec.hidden_size + 2 * spec.intermediate_size) * shape.size
    last = tokens * (whole - late) + trained * late
    return (spec.layers - 1) * tokens * token_bytes(shape, shape.recompute) + last


def workspace_bytes(shape: Shape, tokens: int, trained: int) -> int:
    """What the backward of one layer makes and drops: the gradient of its output, of the gated unit's
    output, of gate and up, and that output again; with a rung, what it computes again. Beside it the
    head's: the normed states and their gradient."""
    spec = shape.spec
    layer = (spec.hidden_size + 4 * spec.intermediate_size) * shape.size * tokens
    if shape.recompute == "mlp":
        layer += 2 * spec.intermediate_size * shape.size * tokens
    elif shape.recompute != "none":
        layer += tokens * token_bytes(shape, "none") + AGAIN_TOUCHED
    return layer + (3 * spec.hidden_size * shape.size + 16) * trained


def preflight_bytes(shape: Shape) -> int:
    """A step of preflight's few rows, and a second gradient to compare with."""
    tokens = PREFLIGHT_TOKENS
    step = activation_bytes(shape, tokens, tokens // 2) + workspace_bytes(shape, tokens, tokens // 2)
    return FLOAT * trained_numbers(shape) + step


def evaluation_bytes(shape: Shape, tokens: int, rows: int, positions: int) -> int:
    """The larger of: the validation loss, one layer at a time; answering `rows` prompts side by side,
    with keys and values of `positions` each, the logits of every row, and a prompt's layer."""
    spec = shape.spec
    layer = (4 * spec.hidden_size + 2 * sum(spec.qkv_rows) + 3 * spec.intermediate_size) * shape.size
    loss = tokens * layer
    cache = 2 * spec.layers * rows * positions * spec.kv_heads * spec.head_dim * shape.size
    answers = cache + 3 * FLOAT * rows * spec.vocab_size + layer * rows * min(positions, 64)
    return max(loss, answers if rows else 0)


def loading_bytes(shape: Shape, file_bytes: int) -> int:
    """Beside the weights: stretches in float32, a query weight whole and turned, and the mapped file's
    pages of one stack or table, as the file has them (`file_bytes` in all)."""
    spec = shape.spec
    turned = 2 * FLOAT * spec.qkv_rows[0] * spec.hidden_size
    stacks = max(sum(rows) * inputs for _, rows, inputs in shape.groups.values())
    most = max(stacks, spec.vocab_size * spec.hidden_size)
    return 2 * FLOAT * STRETCH + turned + int(file_bytes * most / max(1, parameters(spec)))


def parameters(spec: ModelSpec) -> int:
    """Numbers in all weights; a tied head counts once."""
    size, inner = spec.hidden_size, spec.intermediate_size
    layer = size * (sum(spec.qkv_rows) + spec.qkv_rows[0] + 3 * inner + 2)
    return spec.layers * layer + size * (1 + spec.vocab_size * (1 if spec.tied_head else 2))


def count(
    shape: Shape,
    *,
    tokens: int,
    trained: int,
    program: int,
    file_bytes: int,
    rows: int = 0,
    positions: int = 0,
) -> Memory:
    """All parts, for packs of at most `tokens` tokens of which `trained` are trained.

    `program` is what the process holds before the base is loaded. `rows` answered side by side, of
    `positions` tokens each, are the proof's.
    """
    numbers = trained_numbers(shape)
    return Memory(
        program=program + TOUCHED,
        weights=shape.spec.layers * layer_bytes(shape) + table_bytes(shape),
        adapter=adapter_bytes(shape),
        gradients=FLOAT * numbers,
        optimizer=int(STATE[shape.optimizer] * numbers),
        activations=activation_bytes(shape, tokens, trained),
        workspace=workspace_bytes(shape, tokens, trained),
        preflight=preflight_bytes(shape),
        evaluation=evaluation_bytes(shape, tokens, rows, positions),
        loading=loading_bytes(shape, file_bytes),
        merging=program + TOUCHED + FLOAT * (parameters(shape.spec) + numbers),
    )
