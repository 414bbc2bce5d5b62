"""What a run keeps in memory, counted from shapes alone; benchmarks/memory.py measures the same.

The formulas follow what kernels/dispatch.py saves for the backward pass on each rung of the ladder
(model/recompute.py), what lora/layers.py keeps for an adapter, train/optimizer.py for its state and
quant/part.py for a weight.

Letters: T tokens computed at once, M trained positions among them, H hidden, I inner.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from lorimer.config import LoraConfig, QuantConfig
from lorimer.kernels.codes import BLOCKS
from lorimer.kernels.reference import HEAD_CHUNK
from lorimer.lora.layers import saved_paths
from lorimer.lora.targets import Target, select_tables
from lorimer.model.decoder import Decoder
from lorimer.model.foreign_spec import ForeignSpec
from lorimer.model.load import STRETCH
from lorimer.model.spec import Group, ModelSpec

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
    ranks: dict[str, int]  # of each adapted module by its path within a layer
    layers: dict[str, int]  # how many layers have it
    size: int  # bytes of a number in activations and dense weights
    quant: QuantConfig
    kept: str | None = None  # for `keep`: the GGUF type that most weights have
    optimizer: str = "adamw"
    recompute: str = "none"
    tables: int = 0  # numbers trained beside LoRA on layers: of embedding, head and norms
    head: int = 0  # bytes that the loss of a head takes because the head is trained

    def rank(self, group: Group) -> int:
        """The stacked ranks of a group."""
        return sum(self.ranks.get(path, 0) for path in group.paths)


def ranks_of(targets: list[Target], r: int) -> tuple[dict[str, int], dict[str, int]]:
    """The rank of each adapted module by its path within a layer, and how many layers have it."""
    layers = Counter(target.path.partition(f".{target.layer}.")[2] for target in targets)
    return dict.fromkeys(layers, r), layers


def head_bytes(decoder: Decoder, config: LoraConfig, tokens: int) -> int:
    """What the loss of a trained head makes: logits of some positions, their gradient twice; for one that
    is trained in full its copy in the activations' type, and its gradient, weighted and not."""
    rows, columns = decoder.head.weight.shape
    full = decoder.head.path in saved_paths(decoder, config.modules_to_save)
    if not full and not tokens and decoder.head not in select_tables(decoder, config.target_modules):
        return 0
    some = HEAD_CHUNK * rows * (2 * FLOAT + decoder.dtype.itemsize)
    return some + full * rows * columns * (2 * FLOAT + decoder.dtype.itemsize)


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
    """Embedding, positions and head; one table where embedding and head are tied."""
    spec = shape.spec
    tables = 1 if spec.tied_head else 2
    dense = spec.vocab_size * spec.hidden_size * shape.size
    stored = stored_bytes(spec.vocab_size, spec.hidden_size, shape)
    positions = spec.learned_positions * spec.hidden_size * shape.size
    return tables * (stored if shape.quant.embeddings else dense) + positions


def all_groups(spec: ModelSpec) -> Counter[Group]:
    """Every stack of projections, and how many layers have it."""
    return Counter(group for layer in range(spec.layers) for group in spec.groups(layer))


def layers_bytes(shape: Shape) -> int:
    """The frozen weights of all layers."""
    spec = shape.spec
    final = spec.hidden_size * (2 if spec.norm_bias else 1)
    total = FLOAT * (spec.norm_numbers - final)
    for group, copies in all_groups(spec).items():
        total += copies * sum(stored_bytes(count, group.inputs, shape) for count in group.parts)
        total += copies * sum(group.rows) * shape.size * group.bias
    if spec.experts is not None:
        total += FLOAT * len(spec.experts.layers) * spec.experts.count * spec.hidden_size
    return total


def trained_numbers(shape: Shape) -> int:
    """Numbers in the adapter's flat buffer: each A [r, inputs] and B [outputs, r], and what else."""
    total = 0
    for group in all_groups(shape.spec):
        for path, count in zip(group.paths, group.rows, strict=True):
            total += shape.layers.get(path, 0) * shape.ranks.get(path, 0) * (group.inputs + count)
    return total + shape.tables


def adapter_bytes(shape: Shape) -> int:
    """The float32 buffer, and the copies that products use: stacked A, and B with zeros between."""
    copies = 0
    for group in all_groups(shape.spec):
        adapted = max(shape.layers.get(path, 0) for path in group.paths)
        copies += adapted * shape.rank(group) * (group.inputs + sum(group.rows))
    return FLOAT * trained_numbers(shape) + shape.size * copies


def inner_features(spec: ModelSpec) -> int:
    """What the gated unit of one layer computes for a token: gate and up, of all experts that it takes."""
    wide = 2 if spec.gated else 1
    mixture = spec.experts
    return wide * (spec.intermediate_size if mixture is None else mixture.chosen * mixture.inner)


def token_bytes(shape: Shape, rung: str) -> int:
    """What one layer keeps of one token for its backward pass.

    The two norm inputs, query, key and value stacked, the heads' output, gate and up stacked, the input
    times A of each group; in float32 the norms' factors and attention's log sums. With head norms the
    stacked outputs are kept before and after them; what a norm after a part gets is kept too.
    """
    spec, names = shape.spec, shape.spec.names
    if rung in ("layers", "offload"):
        return spec.hidden_size * shape.size if rung == "layers" else 0
    stacked = sum(spec.qkv_rows)
    kept = 2 * spec.hidden_size + stacked + spec.qkv_rows[0]
    kept += 0 if rung == "mlp" else inner_features(spec)
    mixture = spec.experts
    for pair in (
        spec.attention_groups(),
        *spec.mlp_groups(spec.layers - 1)[: mixture.chosen if mixture else 1],
    ):
        kept += sum(shape.rank(group) for group in pair)
    kept += spec.hidden_size * sum(bool(name) for name in (names.attention_post_norm, names.mlp_post_norm))
    factors = len(spec.norms()) * (2 if spec.norm == "layer" else 1) + spec.heads
    if spec.qk_norm:
        kept += stacked * (2 if spec.qk_norm == "own" else 1)  # own weights are a product of their own
        factors += spec.heads + spec.kv_heads
    if mixture is not None:  # each expert's own copy of its tokens, and its result before it is weighted
        kept += (2 * mixture.chosen + 1) * spec.hidden_size
        factors += 3 * mixture.count
    return kept * shape.size + factors * FLOAT


def activation_bytes(shape: Shape, tokens: int, trained: int) -> int:
    """All layers of a pack, on the shape's rung. The last goes on after attention with the trained
    positions alone, and is never computed again."""
    spec = shape.spec
    whole = token_bytes(shape, "none")
    late = (spec.hidden_size + inner_features(spec)) * shape.size
    last = tokens * (whole - late) + trained * late
    return (spec.layers - 1) * tokens * token_bytes(shape, shape.recompute) + last


def workspace_bytes(shape: Shape, tokens: int, trained: int) -> int:
    """What the backward of one layer makes and drops: the gradient of its output, of the gated unit's
    output, of gate and up, and that output again; with a rung, what it computes again. Beside it the
    head's: the picked states of the last layer and of its heads, the normed ones, their gradient before
    and after it is weighted, and the gradient of the states."""
    spec = shape.spec
    inner = inner_features(spec)
    layer = (spec.hidden_size + 2 * inner) * shape.size * tokens
    if shape.recompute == "mlp":
        layer += inner * shape.size * tokens
    elif shape.recompute != "none":
        layer += tokens * token_bytes(shape, "none") + AGAIN_TOUCHED
    return layer + (6 * spec.hidden_size * shape.size + 16) * trained + shape.head


def preflight_bytes(shape: Shape) -> int:
    """A step of preflight's few rows, and a second gradient to compare with."""
    tokens = PREFLIGHT_TOKENS
    step = activation_bytes(shape, tokens, tokens // 2) + workspace_bytes(shape, tokens, tokens // 2)
    return FLOAT * trained_numbers(shape) + step


def evaluation_bytes(shape: Shape, tokens: int, rows: int, positions: int) -> int:
    """The larger of: the validation loss, one layer at a time; answering `rows` prompts side by side,
    with keys and values of `positions` each, the logits of every row, and a prompt's layer."""
    spec = shape.spec
    layer = (4 * spec.hidden_size + 2 * sum(spec.qkv_rows) + 3 * inner_features(spec) // 2) * shape.size
    loss = tokens * layer
    cache = 2 * spec.layers * rows * positions * spec.kv_heads * spec.head_dim * shape.size
    answers = cache + 3 * FLOAT * rows * spec.vocab_size + layer * rows * min(positions, 64)
    return max(loss, answers if rows else 0)


def loading_bytes(shape: Shape, file_bytes: int) -> int:
    """Beside the weights: stretches in float32, a query weight whole and turned, and the mapped file's
    pages of one stack or table, as the file has them (`file_bytes` in all)."""
    spec = shape.spec
    turned = 2 * FLOAT * spec.qkv_rows[0] * spec.hidden_size
    stacks = max(sum(group.rows) * group.inputs for group in all_groups(spec))
    most = max(stacks, spec.vocab_size * spec.hidden_size)
    return 2 * FLOAT * STRETCH + turned + int(file_bytes * most / max(1, parameters(spec)))


def parameters(spec: ModelSpec) -> int:
    """Numbers in all weights; a tied head counts once."""
    if isinstance(spec, ForeignSpec):
        return spec.numbers
    size = spec.hidden_size
    total = spec.norm_numbers
    for group, copies in all_groups(spec).items():
        total += copies * sum(group.rows) * (group.inputs + group.bias)
    if spec.experts is not None:
        total += len(spec.experts.layers) * spec.experts.count * size
    return total + size * (spec.learned_positions + spec.vocab_size * (1 if spec.tied_head else 2))


def used_parameters(spec: ModelSpec) -> int:
    """Numbers in the linear weights that compute one token: of a mixture the experts that it takes."""
    total = 0
    for layer in range(spec.layers):
        mixture = spec.experts
        sparse = mixture is not None and layer in mixture.layers
        pairs = spec.mlp_groups(layer)[: mixture.chosen if sparse and mixture else 1]
        groups = [*spec.attention_groups(), *(group for pair in pairs for group in pair)]
        total += sum(sum(group.rows) * group.inputs for group in groups)
    return total


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
        weights=layers_bytes(shape) + table_bytes(shape),
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
