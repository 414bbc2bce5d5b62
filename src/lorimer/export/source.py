"""What an export reads: the base's files and the adapter's tensors, never a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorimer.bases.open import BaseFiles, open_base
from lorimer.bases.store import resolve_base
from lorimer.config import QuantConfig
from lorimer.data.template import ChatTemplate
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError, BaseError
from lorimer.export.vocabulary import vocabulary_entries
from lorimer.generate.model import adapter_folder, base_of, trained_quant
from lorimer.lora.adapter import (
    AdapterFiles,
    alpha_of,
    check_base,
    check_copies,
    is_adapter,
    ranks_in,
    read_adapter,
    read_template,
    tokens_in,
    with_tokens_of,
)
from lorimer.lora.layers import EMBEDDING_A, EMBEDDING_B, OWN_ROWS, LoraSpec
from lorimer.lora.merge import embedding_name, head_name
from lorimer.model.families import read_spec, why_not_native
from lorimer.model.grow import GrownBase
from lorimer.model.load import read_weight, stored_shape
from lorimer.model.order import adapted_module
from lorimer.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class FileUpdate:
    """An adapter's shape and tensors as its folder has them; merge.py's Update."""

    spec: LoraSpec
    tensors: dict[str, Tensor]

    def for_files(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Source:
    """A base, with an update where an adapter was named, and how text is put to it."""

    name: str
    base: BaseFiles
    spec: ModelSpec
    update: FileUpdate
    adapter: AdapterFiles | None
    tokenizer: Tokenizer
    template: ChatTemplate
    quant: QuantConfig  # how the base's weights were stored when the adapter was trained

    @property
    def file(self) -> BaseFiles:
        """The base as its files are, without tokens that were added."""
        return self.base.inner if isinstance(self.base, GrownBase) else self.base

    @cached_property
    def vocabulary(self) -> dict[str, Any]:
        """The tokenizer as GGUF metadata. Raises BaseError where it has no exact form there."""
        return vocabulary_entries(self.tokenizer, self.spec.vocab_size)


def open_source(what: str, *, base: str | None = None, force: bool = False) -> Source:
    """A run, an adapter folder, or a base (a name, a folder, a .gguf file).

    `base` is another copy of the base; `force` skips the check that it is the one trained on. Raises
    AdapterError or BaseError.
    """
    folder = adapter_folder(Path(what))
    adapter = read_adapter(folder) if is_adapter(folder) else None
    wanted = base if base is not None else base_of(folder) if adapter else what
    files = open_base(resolve_base(wanted))
    if why := why_not_native(files.config):
        raise BaseError(
            f"the architecture `{files.config.get('model_type')}` cannot be exported so: {why}",
            fix="Its adapter is a PEFT folder as it is; `lorimer merge` writes one whole model.",
            path=files.path,
        )
    files = files if adapter is None else with_tokens_of(files, adapter)
    spec = read_spec(files.config, path=str(files.path))
    tokenizer = Tokenizer.from_base(files)
    template = files.chat_template
    update = FileUpdate(LoraSpec({}, {}), {})
    if adapter is not None:
        if not force:
            check_base(adapter, files.fingerprint())
        update = _update_of(adapter, files, spec)
        own = read_template(adapter.path)
        template = template if own is None else own
    name = Path(what).resolve().name or "model"
    return Source(
        name.removesuffix(".gguf"),
        files,
        spec,
        update,
        adapter,
        tokenizer,
        ChatTemplate(template, tokenizer),
        trained_quant(folder if adapter is not None else None),
    )


def _update_of(adapter: AdapterFiles, base: BaseFiles, spec: ModelSpec) -> FileUpdate:
    """The update, each tensor checked against the weight that it changes."""
    ranks = ranks_in(adapter)
    shapes = _module_shapes(base, spec)
    for path in ranks:
        own = _own_name(f"{path}.weight", spec).removesuffix(".weight")
        shape = _adapted_shape(adapter.tensors, path)
        if shape is None or shape != shapes.get(own):
            raise _misfit(adapter, f"{path}.weight")
    head, embedding = (adapter.tensors.get(n) for n in (head_name(spec), embedding_name(spec)))
    for name, tensor in adapter.tensors.items():
        if ".lora_" in name or name.endswith(OWN_ROWS):
            continue
        own = _own_name(name, spec)
        if own not in base.tensors or tuple(tensor.shape) != base.tensors[own].shape:
            raise _misfit(adapter, name)
    rows = dict.fromkeys((spec.names.embedding, spec.names.head), spec.vocab_size)
    lora = LoraSpec(
        ranks=ranks,
        alphas={path: alpha_of(adapter.config, path) for path in ranks},
        rslora=bool(adapter.config.get("use_rslora", False)),
        tokens=tokens_in(adapter, rows),
        tie=spec.tied_head and head is not None and embedding is not None and head.equal(embedding),
    )
    check_copies(adapter, lora, {path: partial(_table, base, spec, path) for path in rows})
    return FileUpdate(lora, adapter.tensors)


def _table(base: BaseFiles, spec: ModelSpec, path: str) -> Tensor:
    return read_weight(base, spec, _own_name(f"{path}.weight", spec)).float()


def _own_name(name: str, spec: ModelSpec) -> str:
    """The weight of the base's files that is meant: a tied head is the embedding."""
    return embedding_name(spec) if name == head_name(spec) and spec.tied_head else name


def _adapted_shape(tensors: Mapping[str, Tensor], path: str) -> tuple[int, ...] | None:
    """The shape of the weight that a module's factors are for."""
    linear = [tensors.get(f"{path}.lora_{side}.weight") for side in "BA"]
    table = [tensors.get(f"{path}.{name}") for name in (EMBEDDING_A, EMBEDDING_B)]
    if linear[0] is not None and linear[1] is not None:
        return linear[0].shape[0], *linear[1].shape[1:]
    if table[0] is not None and table[1] is not None:
        return table[0].shape[1], table[1].shape[0]
    return None


def _module_shapes(base: BaseFiles, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Outputs and inputs of every module that a LoRA may change."""
    found: dict[str, tuple[int, ...]] = {}
    for name in base.tensors:
        if name.endswith(".weight"):
            module, _, parts = adapted_module(spec, name)
            rows, *inputs = stored_shape(base, spec, name)
            found[module] = parts * rows, *inputs
    return found


def _misfit(adapter: AdapterFiles, name: str) -> AdapterError:
    return AdapterError(
        f"the adapter does not fit the base: what it has for `{name}` has no place or another shape",
        fix=f"It says that it was trained on {adapter.base}.",
        path=adapter.path,
    )
