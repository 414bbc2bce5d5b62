"""Which tensors a base must have, and what is said of one that has others.

A config that says fewer layers than its files hold would load and be another model. transformers fills what
is missing with random numbers. Both end here.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorimer.bases.open import BaseFiles
from lorimer.errors import BaseError
from lorimer.model.spec import ModelSpec

SHOWN = 4
# Buffers that some published files keep.
NOT_WEIGHTS = ("attn.bias", "attention.bias", "masked_bias")


def tensor_names(spec: ModelSpec) -> list[str]:
    """The tensors of an architecture by the names that files have, a tied head left out."""
    names, kinds = spec.names, ("weight", "bias") if spec.norm_bias else ("weight",)
    found = [f"{names.embedding}.weight"]
    found += [f"{names.positions}.weight"] if names.positions else []
    for layer in range(spec.layers):
        path = f"{names.layers}.{layer}"
        found += [f"{path}.{norm}.{kind}" for norm, _ in spec.norms() for kind in kinds]
        for norm, heads in spec.head_norms():
            found += dict.fromkeys(f"{path}.{norm.format(head)}.weight" for head in range(heads))
        for group in spec.groups(layer):
            files = group.files or group.paths
            found += [f"{path}.{file}.weight" for file in files]
            found += [f"{path}.{file}.bias" for file in files if group.bias]
        if spec.experts is not None and layer in spec.experts.layers:
            found.append(f"{path}.{names.router}.weight")
    found += [f"{names.final_norm}.{kind}" for kind in kinds]
    return found if spec.tied_head else [*found, f"{names.head}.weight"]


def check_tensors(base: BaseFiles, spec: ModelSpec) -> None:
    """Raise BaseError, naming them, for tensors that are missing or that the architecture does not have."""
    wanted = dict.fromkeys(tensor_names(spec))
    missing = [name for name in wanted if name not in base.tensors]
    head = f"{spec.names.head}.weight"
    if missing == [head]:
        raise BaseError(
            f"the weight `{head}` is missing, and the config says that it is not the embedding",
            fix="If the original ties them, write `tie_word_embeddings: true` into config.json.",
            path=base.path,
        )
    if missing:
        raise BaseError(
            f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            fix="A file of the base was not copied, or its config is another model's.",
            path=base.path,
        )
    inside = f"{spec.names.layers}."
    extra = [name for name in base.tensors if name.startswith(inside) and name not in wanted]
    extra = [
        name for name in extra if name.endswith((".weight", ".bias")) and not name.endswith(NOT_WEIGHTS)
    ]
    if extra:
        raise BaseError(
            f"the architecture `{spec.family}` as the config describes it has no place for {listed(extra)}",
            fix="The config and the weights do not belong together: look at the number of layers, and at "
            "biases and norms.",
            path=base.path,
        )
    if spec.tied_head and head in base.tensors and base.kind != "gguf":
        _check_tied(base, head, f"{spec.names.embedding}.weight")


def _check_tied(base: BaseFiles, head: str, embedding: str) -> None:
    one, other = base.raw(head), base.raw(embedding)
    if one.shape != other.shape or not (one == other).all():
        raise BaseError(
            f"the config says that head and embedding are one, but `{head}` and `{embedding}` differ",
            fix="Write `tie_word_embeddings: false` into config.json if the head was trained apart.",
            path=base.path,
        )
    base.release()


def listed(names: Sequence[str]) -> str:
    """One by its name, or how many there are and the first of them."""
    if len(names) == 1:
        return f"the weight `{names[0]}`"
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
    return f"{len(names)} weights ({shown}{' and more' if len(names) > SHOWN else ''})"
