"""The shape of a model of transformers, read off its modules: what can carry an adapter, and what else is
there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorimer.model.spec import Group, ModelSpec, Names, RopeSpec

# Configs' names of the longest row; where there is none, positions do not end.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
ENDLESS = 10**9
# Rope scalings under which a token turns alike however long its row is.
# Modules whose weights fused kernels read past the module; PEFT puts no adapter on them.
READ_PAST = dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj",))
STEADY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ForeignLinear:
    """One linear layer: its layer (-1 outside of them), its shape, and whether its weight lies across."""

    layer: int
    group: Group
    across: bool

    @property
    def path(self) -> str:
        return self.group.paths[0]


@dataclass(frozen=True, slots=True)
class ForeignSpec(ModelSpec):
    """A ModelSpec of which only what does not depend on a family is true: sizes, the tables' names, whether
    the head is the embedding, the longest row. The rest is in the model's own modules."""

    linears: tuple[ForeignLinear, ...] = ()
    more_tables: tuple[str, ...] = ()
    norm_paths: tuple[str, ...] = ()
    numbers: int = 0  # of all weights


def read_shape(model: Any, config: dict[str, Any]) -> ForeignSpec:
    """The shape of transformers' model. Raises ValueError for one without an embedding or a head."""
    names = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError("it has no embedding or no head of its own")
    linears = tuple(_linears(model, head))
    limits = [config[key] for key in POSITIONS if isinstance(config.get(key), int)]
    modules = list(model.named_modules())
    return ForeignSpec(
        family=str(config.get("model_type")),
        vocab_size=embedding.weight.shape[0],
        hidden_size=head.weight.shape[1],
        intermediate_size=max((linear.group.rows[0] for linear in linears), default=0),
        layers=len({linear.layer for linear in linears} - {-1}),
        heads=1,
        kv_heads=1,
        head_dim=head.weight.shape[1],
        norm_eps=0.0,
        rope=RopeSpec(1.0, 0),
        max_positions=limits[0] if limits else ENDLESS,
        tied_head=id(head.weight) == id(embedding.weight),
        transposed=any(linear.across for linear in linears),
        names=Names(embedding=names[id(embedding)], head=names[id(head)]),
        linears=linears,
        more_tables=tuple(
            path for path, m in modules if isinstance(m, nn.Embedding) and m is not embedding
        ),
        norm_paths=tuple(path for path, module in modules if _is_norm(path, module)),
        numbers=sum(parameter.numel() for parameter in model.parameters()),
    )


def _linears(model: Any, head: nn.Module) -> Iterator[ForeignLinear]:
    """In the order of modules. A class with a forward of its own keeps it, unless that gives the same."""
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head or "." not in path:
            continue
        if path.rpartition(".")[2] in READ_PAST.get(model.config.model_type, ()):
            continue
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward) and not _is_linear(module):
            continue
        across = isinstance(module, Conv1D)
        inputs, outputs = module.weight.shape if across else module.weight.shape[::-1]
        parent, _, name = path.rpartition(".")
        attention = any(word in parent.lower() for word in ("attn", "attention"))
        group = Group(parent, (name,), (outputs,), inputs, module.bias is not None, attention)
        yield ForeignLinear(_layer(path), group, across)


def _is_linear(module: Any) -> bool:
    """Whether a class derived from a linear layer computes what that does."""
    weight_OI, bias_O = module.weight, module.bias
    if weight_OI.device.type == "meta":
        return True
    generator = torch.Generator().manual_seed(0)
    states_TI = torch.randn((3, weight_OI.shape[1]), generator=generator).to(weight_OI)
    with torch.no_grad():
        wanted = nn.functional.linear(states_TI, weight_OI, bias_O)
        try:
            found = module(states_TI)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes other states than a layer's
            return False
    if found.shape != wanted.shape:
        return False
    limit = 1e-5 if wanted.dtype == torch.float32 else 0.02
    return bool((found - wanted).abs().max() <= limit * wanted.abs().max())


def _layer(path: str) -> int:
    """The first number in a path, as PEFT counts layers."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def _is_norm(path: str, module: Any) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 1 and not any(module.children())


def steady(config: dict[str, Any]) -> bool:
    """Whether a token turns alike however long its row is, as far as the config says."""
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(value[key] for key in ("rope_type", "type") if key in value)
            for inside in value.values():
                look(inside)

    look(config.get("rope_parameters"))
    look(config.get("rope_scaling"))
    return all(kind in STEADY for kind in found)
