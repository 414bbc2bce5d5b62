"""PEFT keeps the adapters of all experts of a layer in two tensors for each of their projections.

Here each expert's projections have an A [r, I] and a B [O, r] of their own, named
`...experts.3.down_proj.lora_A.weight`. In a PEFT folder `...experts.lora_A.weight` is [E * r, I], expert
after expert, and `...experts.lora_B.weight` [O, r * E], rank after rank with all experts of each. Where
both projections are adapted, those of the first lie under `base_layer`.

Letters: E experts, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FIRST, SECOND = "gate_up_proj", "down_proj"
OURS = re.compile(rf"(.*)\.(\d+)\.({FIRST}|{SECOND})\.lora_([AB])\.weight")
THEIRS = re.compile(r"(.*\.experts)\.(base_layer\.)?lora_([AB])\.weight")


def stack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names -> by PEFT's, those of experts brought together."""
    found: dict[str, Tensor] = {}
    experts: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := OURS.fullmatch(name):
            path, number, projection, kind = match.groups()
            experts.setdefault((path, projection, kind), {})[int(number)] = tensor
        else:
            found[name] = tensor
    for (path, projection, kind), parts in experts.items():
        both = (path, SECOND, kind) in experts and projection == FIRST
        ordered = [parts[number] for number in range(len(parts))]
        whole = torch.cat(ordered) if kind == "A" else torch.stack(ordered, -1).flatten(1)
        found[f"{path}.{'base_layer.' if both else ''}lora_{kind}.weight"] = whole
    return found


def unstack(tensors: Mapping[str, Tensor], parameters: Sequence[str], rank: int) -> dict[str, Tensor]:
    """The way back. `parameters` are PEFT's `target_parameters`. Raises ValueError for what is not so."""
    wanted = {path.rpartition(".")[2] for path in parameters}
    strange = wanted - {FIRST, SECOND}
    if strange:
        raise ValueError(f"`target_parameters` names {', '.join(sorted(strange))}, which is not known")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = THEIRS.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        path, inner, kind = match.groups()
        projection = FIRST if inner or wanted == {FIRST} else SECOND
        size = tensor.shape[0] if kind == "A" else tensor.shape[-1]
        if tensor.dim() != 2 or rank < 1 or size % rank:
            raise ValueError(
                f"`{name}` has the shape {list(tensor.shape)}, which rank {rank} does not divide"
            )
        parts = tensor.split(rank) if kind == "A" else tensor.unflatten(1, (rank, -1)).unbind(-1)
        for number, part in enumerate(parts):
            found[f"{path}.{number}.{projection}.lora_{kind}.weight"] = part.contiguous()
    return found


def is_expert(path: str) -> bool:
    """Whether a module's path is that of an expert's projection."""
    return OURS.fullmatch(f"{path}.lora_A.weight") is not None


def parameter_of(path: str) -> str:
    """PEFT's name of the parameter that an expert's projection is a part of."""
    return re.sub(r"\.\d+\.(\w+)$", r".\1", path)
