"""What differs between architectures, as data. The decoder reads nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions: `dimensions` features of each head turn, at base `theta`, scaled by `kind`."""

    theta: float
    dimensions: int
    kind: RopeKind = "default"
    max_positions: int = 2048
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # the scaling's own numbers, as configs name them


@dataclass(frozen=True, slots=True)
class Names:
    """Hugging Face's names of modules; from `attention_norm` on within a layer. "" is a module that the
    architecture does not have. Names stacked in one group share their parent and their input."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    attention_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_post_norm: str = ""
    # Transformers has the experts of a layer in two parameters, files have each expert's own weights.
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    expert_files: str = "mlp.experts"
    expert_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """A mixture: of `count` gated units of `inner` features each token takes the `chosen` best."""

    count: int
    chosen: int
    inner: int
    renormalise: bool  # the weights of the chosen add up to 1
    layers: frozenset[int]  # the others have one unit of the model's intermediate size


class Group(NamedTuple):
    """Linear layers of one layer that share an input, stacked. `path` is within the layer."""

    path: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    bias: bool
    attention: bool
    files: tuple[str, ...] = ()  # the weights of a fused layer, where files have its parts

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of each weight of the files."""
        return self.rows if not self.files else (sum(self.rows) // len(self.files),) * len(self.files)

    @property
    def paths(self) -> list[str]:
        """Each layer's path within its layer."""
        return [f"{self.path}.{name}".removeprefix(".") for name in self.names]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One architecture, sized. Lengths are in features unless the name says otherwise."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_positions: int
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm: NormKind = "rms"
    norm_offset: float = 0.0  # added to each RMSNorm's weight
    norm_bias: bool = False
    # A norm before the rotation: RMSNorm over each head of query and key, or over all heads of a token; or
    # LayerNorm without bias over each head, whose weight is the head's own.
    qk_norm: Literal["", "head", "all", "own"] = ""
    activation: Activation = "silu"
    gated: bool = True  # activation(gate) * up, or activation(up) alone
    parallel: bool = False  # attention and the gated unit read the same states, and are added up
    windows: tuple[int | None, ...] = ()  # for each layer: how many positions back it sees; None is all
    # For each layer: 0 is `rope`, 1 and more one of `more_ropes`, None no turn at all.
    turns: tuple[int | None, ...] = ()
    more_ropes: tuple[RopeSpec, ...] = ()
    rope_pairs: bool = False  # features 2i and 2i + 1 turn together, and not i and i + D/2
    learned_positions: int = 0  # rows of a table of positions
    first_position: int = 0  # the row of position 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the gated unit add
    score_scale: float | None = None  # of query times key; None is 1 / sqrt(head_dim)
    score_cap: float = 0.0  # scores become c * tanh(scores / c); 0 for none
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    grouped_rows: bool = False  # a fused weight has query, key and value of each key/value head together
    transposed: bool = False  # linear weights lie [inputs, outputs] in the files
    experts: ExpertSpec | None = None
    names: Names = Names()

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def turn(self, layer: int) -> int | None:
        return self.turns[layer] if self.turns else 0

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        return (self.rope, *self.more_ropes)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Outputs of query, key and value."""
        keys = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, keys, keys

    @property
    def attention_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim) if self.score_scale is None else self.score_scale

    def attention_groups(self) -> tuple[Group, Group]:
        """The projections of query, key and value, and of what the heads give."""
        names, rows = self.names, self.qkv_rows
        fused = rows if len(names.qkv) == 3 else (sum(rows),)
        return (
            _group(names.qkv, fused, self.hidden_size, self.qkv_bias, attention=True),
            _group((names.output,), (self.hidden_size,), rows[0], self.output_bias, attention=True),
        )

    def mlp_groups(self, layer: int) -> list[tuple[Group, Group]]:
        """The projections up and down: one pair, or one for each expert."""
        names, mixture = self.names, self.experts
        if mixture is None or layer not in mixture.layers:
            return [self._pair(names.up, names.down, self.intermediate_size)]
        return [self._expert(mixture, number) for number in range(mixture.count)]

    def _expert(self, mixture: ExpertSpec, number: int) -> tuple[Group, Group]:
        """Gate and up are one layer, as they are one parameter in transformers."""
        names, path = self.names, f"{self.names.experts}.{number}"
        inside = f"{names.expert_files}.{number}."
        up, down = self._pair((f"{path}.gate_up_proj",), f"{path}.down_proj", mixture.inner)
        return (
            up._replace(files=tuple(inside + name for name in names.expert_up)),
            down._replace(files=(inside + names.expert_down,)),
        )

    def _pair(self, up: tuple[str, ...], down: str, inner: int) -> tuple[Group, Group]:
        total = 2 * inner if self.gated else inner
        rows = (total // len(up),) * len(up)
        return (
            _group(up, rows, self.hidden_size, self.mlp_bias),
            _group((down,), (self.hidden_size,), inner, self.mlp_bias),
        )

    def groups(self, layer: int) -> list[Group]:
        """All linear layers of a layer that can carry an adapter, in the order of computation."""
        pairs = self.mlp_groups(layer)
        return [*self.attention_groups(), *(group for pair in pairs for group in pair)]

    def norms(self) -> list[tuple[str, int]]:
        """The norms of a layer: name and size."""
        names, hidden = self.names, self.hidden_size
        fields = (names.attention_norm, names.attention_post_norm, names.mlp_norm, names.mlp_post_norm)
        found = [(name, hidden) for name in dict.fromkeys(fields) if name]
        if self.qk_norm in ("head", "all"):
            query, key, _ = self.qkv_rows if self.qk_norm == "all" else (self.head_dim,) * 3
            found += [(names.query_norm, query), (names.key_norm, key)]
        return found

    def head_norms(self) -> list[tuple[str, int]]:
        """The norms that heads have of their own: name, with {} for the head where each is a tensor, and
        how many."""
        if self.qk_norm != "own":
            return []
        return [(self.names.query_norm, self.heads), (self.names.key_norm, self.kv_heads)]

    @property
    def norm_numbers(self) -> int:
        """Numbers in all norms: weights, and biases where they have them."""
        each = 2 if self.norm_bias else 1
        layer = each * sum(size for _, size in self.norms())
        layer += self.head_dim * sum(heads for _, heads in self.head_norms())
        return self.layers * layer + each * self.hidden_size

    def first_layers(self, layers: int) -> ModelSpec:
        """The same with so many layers."""
        return replace(self, layers=layers, windows=self.windows[:layers], turns=self.turns[:layers])


def _group(
    paths: tuple[str, ...], rows: tuple[int, ...], inputs: int, bias: bool, *, attention: bool = False
) -> Group:
    parent = paths[0].rpartition(".")[0]
    names = tuple(path.rpartition(".")[2] for path in paths)
    return Group(parent, names, rows, inputs, bias, attention)
