"""What an export reads: the base's files and the adapter's tensors, never a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lorimer.bases.open import BaseFiles, open_base
from lorimer.bases.store import resolve_base
from lorimer.config import QuantConfig
from lorimer.data.template import ChatTemplate
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError
from lorimer.export.vocabulary import vocabulary_entries
from lorimer.generate.model import adapter_folder, base_of, trained_quant
from lorimer.lora.adapter import AdapterFiles, alpha_of, check_base, is_adapter, read_adapter
from lorimer.lora.layers import LoraSpec
from lorimer.lora.merge import embedding_name, head_name
from lorimer.model.families import read_spec
from lorimer.model.load import stored_shape
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
    spec = read_spec(files.config, path=str(files.path))
    tokenizer = Tokenizer.from_base(files)
    template = files.chat_template
    update = FileUpdate(LoraSpec({}, {}), {})
    if adapter is not None:
        if not force:
            check_base(adapter, files.fingerprint())
        update = _update_of(adapter, files, spec)
        own = adapter.path / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.is_file() else template
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
    suffix = ".lora_A.weight"
    paths = [name.removesuffix(suffix) for name in adapter.tensors if name.endswith(suffix)]
    shapes = _module_shapes(base, spec)
    for path in paths:
        down, up = adapter.tensors[path + suffix], adapter.tensors.get(f"{path}.lora_B.weight")
        if up is None or (up.shape[0], *down.shape[1:]) != shapes.get(path):
            raise _misfit(adapter, f"{path}.weight")
    head, embedding = (adapter.tensors.get(n) for n in (head_name(spec), embedding_name(spec)))
    for name, tensor in adapter.tensors.items():
        if ".lora_" in name:
            continue
        own = embedding_name(spec) if name == head_name(spec) and spec.tied_head else name
        if own not in base.tensors or tuple(tensor.shape) != base.tensors[own].shape:
            raise _misfit(adapter, name)
    lora = LoraSpec(
        ranks={path: adapter.tensors[path + suffix].shape[0] for path in paths},
        alphas={path: alpha_of(adapter.config, path) for path in paths},
        rslora=bool(adapter.config.get("use_rslora", False)),
        tie=spec.tied_head and head is not None and embedding is not None and head.equal(embedding),
    )
    return FileUpdate(lora, adapter.tensors)


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
