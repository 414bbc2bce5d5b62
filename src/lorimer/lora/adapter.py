"""An adapter is a PEFT folder, in and out, with a manifest of what it belongs to.

adapter_config.json         PEFT's LoraConfig
adapter_model.safetensors   float32, PEFT's names
lorimer.json                base fingerprint, template and data hashes, versions, lineage
README.md, tokenizer files  so that the folder can be used on its own
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorimer.bases.json_object import COPY, unique
from lorimer.bases.open import BaseFiles
from lorimer.bases.safetensors import SafetensorsFile
from lorimer.config import LoraConfig
from lorimer.data.added import brought_by, last_id
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError, ConfigError
from lorimer.lora.layers import EMBEDDING_A, OWN_ROWS, Adapter, LoraSpec, inject, saved_paths
from lorimer.lora.stacked import is_expert, parameter_of, stack, unstack
from lorimer.lora.targets import Target, all_targets, select_tables, select_targets
from lorimer.model.decoder import Decoder
from lorimer.model.grow import with_tokens
from lorimer.storage import write_folder, write_tensors

CHECK = "Check it against the adapter's original."
# A repeated group, or several stretches of any length: such a pattern can try every way to cut a text.
ENDLESS = re.compile(r"\)[*+{]|([*+}][^*+}]*){4}")
WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "lorimer.json"
TEMPLATE = "chat_template.jinja"
PREFIX = "base_model.model."
# What PEFT can do to a LoRA that would change its result and is not computed here.
NOT_SUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter folder that was read and found whole: its settings, tensors and manifest."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ours: dict[str, Any]
    # The base's own embedding and head by path: PEFT saves them beside what it adapts of them.
    copies: dict[str, Tensor] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def new_adapter(
    decoder: Decoder, config: LoraConfig, *, seed: int, tokens: Sequence[int] = ()
) -> tuple[Adapter, list[Target]]:
    """A fresh adapter as the settings say, put on the decoder. It changes nothing yet.

    `tokens` are the ids of tokens that the base did not have. Raises ConfigError.
    """
    targets = select_targets(decoder, config.target_modules, config.layers)
    tables = [table.path for table in select_tables(decoder, config.target_modules)]
    paths = [*(target.path for target in targets), *tables]
    full = saved_paths(decoder, config.modules_to_save)
    if both := [path for path in tables if path in full]:
        raise ConfigError(
            f"`{both[0]}` is in `lora.target_modules` and in `lora.modules_to_save`",
            fix="Train it in full or with LoRA: name it in one of the two.",
        )
    if tokens and tables:
        raise ConfigError(
            f"`lora.target_modules` names `{tables[0].rpartition('.')[2]}`, and `data.add_tokens` needs "
            "rows of its own there: PEFT has no form for both",
            fix="Leave it out, and the new tokens' rows are trained; or train every row: "
            f"`lora.modules_to_save: [{', '.join(path.rpartition('.')[2] for path in _pair(decoder))}]`.",
        )
    spec = LoraSpec(
        ranks=dict.fromkeys(paths, config.r),
        alphas=dict.fromkeys(paths, config.alpha),
        rslora=config.rslora,
        dropout=config.dropout,
        bias=config.bias,
        modules_to_save=full,
        tie=decoder.spec.tied_head,
        tokens={path: tuple(tokens) for path in _pair(decoder) if tokens and path not in full},
    )
    return inject(decoder, targets, spec, seed=seed), targets


def table_numbers(decoder: Decoder, config: LoraConfig, tokens: int) -> int:
    """How many numbers of embedding, head and norms these settings train, with so many new tokens."""
    full = saved_paths(decoder, config.modules_to_save)
    total = sum(
        config.r * sum(table.weight.shape) for table in select_tables(decoder, config.target_modules)
    )
    total += sum(slot.frozen.weight_H.numel() for slot in decoder.norms() if slot.path in full)
    for table in decoder.tables():
        rows, columns = table.weight.shape
        if table is decoder.head and decoder.spec.tied_head:
            continue
        if table.path in full:
            total += rows * columns
        elif table is decoder.embedding or table is decoder.head:
            total += tokens * columns
    return total


def _pair(decoder: Decoder) -> list[str]:
    """The embedding, and the head where it is another tensor."""
    return list(dict.fromkeys(table.path for table in (decoder.embedding, decoder.head)))[
        : 1 if decoder.spec.tied_head else 2
    ]


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter folder. Raises AdapterError if a file is missing, broken or not supported."""
    config = _read_json(path / CONFIG, "an adapter's settings")
    ours = _read_json(path / OURS, "an adapter's manifest") if (path / OURS).is_file() else {}
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterError(
            f"the adapter is of the kind {config.get('peft_type')} (wanted: LORA)",
            fix="Use it with the tool that made it, or train a LoRA adapter.",
            path=path / CONFIG,
        )
    used = [name for name in NOT_SUPPORTED if config.get(name)]
    if used:
        raise AdapterError(
            f"the adapter uses {', '.join(used)}, which is not supported",
            fix="Merge it with the tool that made it, and use the merged model as a base.",
            path=path / CONFIG,
        )
    if not (path / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle and is not read)" * (path / "adapter_model.bin").exists()
        fix = "Save it as safetensors where you trust it." if pickled else "Copy the folder again, whole."
        raise AdapterError(f"{WEIGHTS} is missing{pickled}", fix=fix, path=path)
    _check_settings(config, ours, path)
    file = SafetensorsFile(path / WEIGHTS)
    for name, entry in file.tensors.items():
        if not entry.dtype.startswith(("F", "BF")):
            raise AdapterError(
                f"`{name}` is {entry.dtype} (wanted: floating-point numbers)", fix=COPY, path=path / WEIGHTS
            )
        if 0 in entry.shape:
            raise AdapterError(
                f"`{name}` has the shape {list(entry.shape)}, a rank of 0", fix=COPY, path=path / WEIGHTS
            )
    tensors = {name: file.tensor(name) for name in file.tensors}
    stray = [name for name in tensors if not name.startswith(PREFIX)]
    if stray or not tensors:
        what = f"`{stray[0]}` is not a name that PEFT writes" if stray else "it holds no tensors"
        fix = "Save the adapter with PEFT's save_pretrained."
        raise AdapterError(f"the adapter's weights cannot be used: {what}", fix=fix, path=path / WEIGHTS)
    named = _unstacked(path, config, {name.removeprefix(PREFIX): t for name, t in tensors.items()})
    ends = (".token_adapter.base_layer.weight", ".base_layer.weight")
    copies = {
        name: next((name.removesuffix(end) for end in ends if name.endswith(end)), "") for name in named
    }
    copied = {path: named.pop(name) for name, path in copies.items() if path}
    named = {name.replace(".base_layer.", "."): t for name, t in named.items()}
    bad = [name for name, tensor in named.items() if not torch.isfinite(tensor).all()]
    if bad:
        fix = "Copy it again; if it was trained so, train it with a lower learning rate."
        raise AdapterError(f"`{bad[0]}` holds NaN or infinity", fix=fix, path=path / WEIGHTS)
    return AdapterFiles(path, config, named, ours, copied)


def _check_settings(config: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """Raise AdapterError for what later code takes to be of its kind."""
    named = config.get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        problem = f"`base_model_name_or_path` is {named!r} (wanted: text)"
        raise AdapterError(problem, fix=CHECK, path=path / CONFIG)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problem = f"`bias` is {config['bias']!r} (wanted: none, all or lora_only)"
        raise AdapterError(problem, fix=CHECK, path=path / CONFIG)
    base = ours.get("base", {})
    if not isinstance(base, dict):
        problem = f"`base` is {base!r} (wanted: an object)"
        raise AdapterError(problem, fix=COPY, path=path / OURS)
    for key in ("fingerprint", "path"):
        if not isinstance(base.get(key) or "", str):
            problem = f"`base.{key}` is {base[key]!r} (wanted: text)"
            raise AdapterError(problem, fix=COPY, path=path / OURS)


def read_template(path: Path) -> str | None:
    """The chat template that an adapter folder keeps, if it keeps one. Raises AdapterError."""
    file = path / TEMPLATE
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        fix = f"{COPY} If you wrote it, save it as UTF-8."
        raise AdapterError(f"the chat template cannot be read: {error}", fix=fix, path=file) from error


def _unstacked(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each expert's own adapter, out of PEFT's for all experts."""
    parameters, rank = config.get("target_parameters") or [], config.get("r")
    listed = isinstance(parameters, list) and all(isinstance(item, str) for item in parameters)
    if not listed or not isinstance(rank, int):
        wanted = f"`target_parameters` is {parameters!r} and `r` is {rank!r} (wanted: names and a number)"
        raise AdapterError(wanted, fix=CHECK, path=path / CONFIG)
    try:
        return unstack(tensors, parameters, rank) if parameters else tensors
    except ValueError as error:
        raise AdapterError(f"the adapter's experts cannot be used: {error}", path=path / WEIGHTS) from error


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path.name} is missing", fix="Give an adapter folder as PEFT writes it.", path=path.parent
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{what} cannot be read: {error}", fix=COPY, path=path) from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} should be a JSON object", fix=COPY, path=path)
    return value


def attach_adapter(
    decoder: Decoder, files: AdapterFiles, *, fingerprint: str | None = None, force: bool = False
) -> Adapter:
    """Put a saved adapter on the decoder.

    Every tensor must find its place and every place its tensor. `fingerprint` is the base's: an
    adapter that says it was trained on another is refused unless `force`. Raises AdapterError.
    """
    if fingerprint and not force:
        check_base(files, fingerprint)
    spec, targets = _spec_of(decoder, files)
    tables = {table.path: table for table in (decoder.embedding, decoder.head)}
    check_copies(files, spec, {path: table.weight.dequantise for path, table in tables.items()})
    adapter = inject(decoder, targets, spec)
    wanted = set(adapter.tensors)
    found = set(files.tensors)
    if wanted != found:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        what = f"`{missing[0]}` is missing" if missing else f"`{extra[0]}` has no place in this model"
        fix = f"It says that it was trained on {files.base}."
        raise AdapterError(f"the adapter does not fit the base: {what}", fix=fix, path=files.path / WEIGHTS)
    for name, tensor in adapter.tensors.items():
        if tensor.shape != files.tensors[name].shape:
            raise _misfit(files, name, tuple(tensor.shape))
        adapter.take(name, files.tensors[name])
    adapter.refresh()
    return adapter


def check_copies(files: AdapterFiles, spec: LoraSpec, tables: Mapping[str, Callable[[], Tensor]]) -> None:
    """The base's own tables that a folder holds must be this base's, but for rows that are trained.

    Raises AdapterError: what was changed there without training would be lost.
    """
    for path, copy in files.copies.items():
        own = tables[path]() if path in tables else None
        same = own is not None and own.shape == copy.shape
        if same and own is not None:
            apart = (own - copy.float()).abs()
            apart[list(spec.tokens.get(path, ()))] = 0.0
            # Rounded to bf16 as a base may be, or quantised.
            same = bool((apart <= 0.01 * own.abs() + 1e-6 * own.abs().max()).all())
        if not same:
            raise AdapterError(
                f"the adapter brings another `{path}` than this base has",
                fix="Merge it with the tool that made it, and use the merged model as a base.",
                path=files.path / WEIGHTS,
            )


def check_base(files: AdapterFiles, fingerprint: str) -> None:
    """Raise AdapterError if the adapter says that it was trained on another base than this."""
    made_for = files.ours.get("base", {}).get("fingerprint")
    if made_for and made_for != fingerprint:
        raise AdapterError(
            f"the adapter was trained on another base: {files.base} with the fingerprint "
            f"{made_for[:12]} (this one: {fingerprint[:12]})",
            fix="Use the base it was trained on; on a differently stored copy of the same weights, "
            "add --force.",
            path=files.path,
        )


def _misfit(files: AdapterFiles, name: str, wanted: tuple[int, ...]) -> AdapterError:
    return AdapterError(
        f"the adapter is for another base: `{name}` has the shape "
        f"{list(files.tensors[name].shape)} (wanted: {list(wanted)})",
        fix=f"It says that it was trained on {files.base}.",
        path=files.path / WEIGHTS,
    )


def _spec_of(decoder: Decoder, files: AdapterFiles) -> tuple[LoraSpec, list[Target]]:
    """What the tensors themselves say is adapted; scales from the settings."""
    known = {target.path: target for target in all_targets(decoder)}
    tables = {table.path: table for table in (decoder.embedding, decoder.head)}
    paths = list(ranks_in(files))
    strangers = [path for path in paths if path not in known and path not in tables]
    if strangers:
        raise AdapterError(
            f"the adapter is for another base: this one has no module `{strangers[0]}`",
            fix=f"It says that it was trained on {files.base}.",
            path=files.path,
        )
    saved = tuple(slot.path for slot in decoder.slots() if f"{slot.path}.weight" in files.tensors)
    pair = [files.tensors.get(f"{table.path}.weight") for table in (decoder.embedding, decoder.head)]
    one = pair[0] is not None and pair[1] is not None and torch.equal(pair[0], pair[1])
    spec = LoraSpec(
        ranks=ranks_in(files),
        alphas={path: alpha_of(files.config, path) for path in paths},
        rslora=bool(files.config.get("use_rslora", False)),
        dropout=_number(files.config.get("lora_dropout") or 0.0, "lora_dropout"),
        bias=str(files.config.get("bias", "none")),
        modules_to_save=saved,
        tie=decoder.spec.tied_head and one,
        tokens=tokens_in(files, {path: table.weight.shape[0] for path, table in tables.items()}),
    )
    if both := [path for path in spec.tokens if path in spec.ranks or path in saved]:
        raise AdapterError(f"it trains rows of `{both[0]}` and more of it, which is not supported")
    return spec, [known[path] for path in sorted((p for p in paths if p in known), key=list(known).index)]


def ranks_in(files: AdapterFiles) -> dict[str, int]:
    """The rank of each adapted module by its path, as the tensors themselves have it."""
    ends = (".lora_A.weight", f".{EMBEDDING_A}")
    return {
        name.removesuffix(end): tensor.shape[0]
        for name, tensor in files.tensors.items()
        for end in ends
        if name.endswith(end)
    }


def tokens_in(files: AdapterFiles, rows: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The ids whose rows an adapter has, by the path of the table; `rows` of each that the model has.

    Raises AdapterError.
    """
    paths = [name.removesuffix(f".{OWN_ROWS}") for name in files.tensors if name.endswith(OWN_ROWS)]
    if files.config.get("trainable_token_indices") and not paths:
        raise AdapterError(
            f"`trainable_token_indices` names tokens, and {WEIGHTS} has no rows of theirs",
            fix=CHECK,
            path=files.path / CONFIG,
        )
    found = {}
    for path in paths:
        ids = _listed_ids(files, path)
        if path not in rows:
            raise AdapterError(f"the adapter is for another base: this one has no table `{path}`")
        if not ids or len(set(ids)) < len(ids) or len(ids) != files.tensors[f"{path}.{OWN_ROWS}"].shape[0]:
            raise AdapterError(
                f"`trainable_token_indices` does not go with the rows of `{path}` in {WEIGHTS}",
                path=files.path / CONFIG,
            )
        if not 0 <= min(ids) <= max(ids) < rows[path]:
            raise AdapterError(
                f"the adapter has a row for the token {max(ids):,}, and this model {rows[path]:,} tokens: "
                "it was loaded without the adapter's own",
                fix="Load the model by the adapter's folder, which holds the tokenizer with them.",
                path=files.path,
            )
        found[path] = tuple(ids)
    return found


def _listed_ids(files: AdapterFiles, path: str) -> list[int]:
    """`trainable_token_indices`: a list for the embedding, or one for each module by its path's end."""
    given = files.config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next(
            (ids for name, ids in given.items() if path == name or path.endswith(f".{name}")), None
        )
    whole = isinstance(given, list) and all(type(number) is int for number in given)
    return list(given) if isinstance(given, list) and whole else []


def with_tokens_of(base: BaseFiles, files: AdapterFiles) -> BaseFiles:
    """The base with the tokens that an adapter brings: its manifest names them, or else the tokenizer in
    its folder, where the adapter has rows that the base has not. Raises AdapterError if they do not fit."""
    listed = files.config.get("trainable_token_indices") or []
    lists = listed.values() if isinstance(listed, dict) else [listed]
    largest = max(
        (n for part in lists if isinstance(part, list) for n in part if type(n) is int), default=-1
    )
    if files.ours.get("added_tokens") is None and largest < 0:
        return base
    tokenizer, file = Tokenizer.from_base(base), files.path / "tokenizer.json"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    added = brought_by(text if largest > last_id(tokenizer) else None, files.ours, tokenizer)
    try:
        return with_tokens(base, added)
    except ConfigError as error:
        raise AdapterError(
            f"the adapter's own tokens do not fit this base: {error.problem}",
            fix="Use the base that it was trained on.",
            path=files.path,
        ) from error


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """PEFT's alpha_pattern: a key is the end of a path, or a pattern for it. Raises AdapterError."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"`alpha_pattern` in {CONFIG} should be a JSON object", fix=CHECK)
    for pattern, value in patterns.items():
        if ENDLESS.search(pattern) or len(pattern) > 500:
            raise AdapterError(
                f"`alpha_pattern` in {CONFIG} has a pattern that could take for ever: {pattern[:80]!r}",
                fix="Name the modules, or give one pattern for each.",
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise AdapterError(
                f"`alpha_pattern` in {CONFIG} has no pattern: {pattern!r}: {error}", fix=CHECK
            ) from error
        if found:
            return _number(value, "alpha_pattern")
    if config.get("lora_alpha") is None:
        raise AdapterError(f"{CONFIG} does not say `lora_alpha`", fix=CHECK)
    return _number(config["lora_alpha"], "lora_alpha")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise AdapterError(f"`{name}` in {CONFIG} is {repr(value)[:40]} (wanted: a number)", fix=CHECK)
    return float(value)


def save_adapter(
    path: Path,
    adapter: Adapter,
    decoder: Decoder,
    *,
    base: str,
    ours: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the adapter as a PEFT folder, whole or not at all. Raises StorageError."""
    write_folder(path, lambda folder: fill_adapter(folder, adapter, decoder, base, ours, extra_files or {}))


def fill_adapter(
    folder: Path,
    adapter: Adapter,
    decoder: Decoder,
    base: str,
    ours: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """The files of an adapter, into an existing folder."""
    config = peft_config(adapter, decoder, base)
    for name, content in extra_files.items():
        (folder / name).write_bytes(content)
    named = {_peft_name(name, adapter): adapter.for_files(name).cpu() for name in adapter.tensors}
    tensors = {name: tensor.clone() for name, tensor in stack(named).items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / OURS).write_text(json.dumps(ours, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(config, ours, decoder), encoding="utf-8")


def _peft_name(name: str, adapter: Adapter) -> str:
    """PEFT keeps the bias of an adapted module under its `base_layer`."""
    module, _, kind = name.rpartition(".")
    if kind == "bias" and f"{module}.lora_A.weight" in adapter.tensors:
        return f"{PREFIX}{module}.base_layer.bias"
    return PREFIX + name


def peft_config(adapter: Adapter, decoder: Decoder, base: str) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs to build the same modules."""
    spec = adapter.spec
    paths = list(spec.ranks)
    ranks, alphas = list(spec.ranks.values()), list(spec.alphas.values())
    r = max(set(ranks), key=ranks.count)
    alpha = max(set(alphas), key=alphas.count)
    names, layers = _compact([path for path in paths if not is_expert(path)], decoder)
    tokens: dict[str, list[int]] | list[int] | None
    tokens = {path.rpartition(".")[2]: list(ids) for path, ids in spec.tokens.items()}
    if list(spec.tokens) == [decoder.embedding.path]:
        (tokens,) = tokens.values()  # PEFT's word for the embedding, and a head that is tied to it
    parameters = _parameters(paths, decoder)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        # PEFT computes no dropout where it adapts parameters; while answering there is none.
        "lora_dropout": 0.0 if parameters else spec.dropout,
        "target_modules": names or None,
        "target_parameters": parameters or None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {path: rank for path, rank in spec.ranks.items() if rank != r},
        "alpha_pattern": {path: _plain(value) for path, value in spec.alphas.items() if value != alpha},
        "bias": spec.bias,
        "use_rslora": spec.rslora,
        "use_dora": False,
        "fan_in_fan_out": decoder.spec.transposed,
        "init_lora_weights": True,
        "modules_to_save": list(spec.modules_to_save) or None,
        "trainable_token_indices": tokens or None,
    }


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _compact(paths: Sequence[str], decoder: Decoder) -> tuple[list[str], list[int] | None]:
    """The shortest settings that choose exactly these modules: names, names in some layers, or paths."""
    targets = [target for target in all_targets(decoder) if not is_expert(target.path)]
    tables = [table.path for table in (decoder.embedding, decoder.head) if table.path in paths]
    chosen = set(paths) - set(tables)
    names = sorted({target.name for target in targets if target.path in chosen})
    layers = sorted({target.layer for target in targets if target.path in chosen})
    product = {t.path for t in targets if t.name in names and t.layer in layers}
    every = len(layers) == len({target.layer for target in targets})
    # PEFT's choice of layers leaves out what is in none, which is -1 here.
    if product != chosen or (not every and (-1 in layers or (tables and layers))):
        return sorted(paths), None
    ends = [path.rpartition(".")[2] for path in tables]
    return sorted([*names, *ends]), None if every else layers or None


def _parameters(paths: Sequence[str], decoder: Decoder) -> list[str]:
    """PEFT's names of the parameters that hold the adapted experts: their ends, if all layers have them."""
    chosen = {parameter_of(path) for path in paths if is_expert(path)}
    every = {parameter_of(t.path) for t in all_targets(decoder) if is_expert(t.path)}
    ends = {".".join(path.split(".")[-3:]) for path in chosen}
    whole = {path for path in every if ".".join(path.split(".")[-3:]) in ends}
    return sorted(ends if whole == chosen else chosen)


def _readme(config: Mapping[str, Any], ours: Mapping[str, Any], decoder: Decoder) -> str:
    base, added = config["base_model_name_or_path"], ours.get("added_tokens") or {}
    tokens = ", ".join(f"`{token}`" for kind in ("text", "special") for token in added.get(kind, []))
    grown = added.get("rows")
    resize = f" and `base_model.resize_token_embeddings({grown})`" if grown else ""
    first = (
        f"\nIt has tokens of its own: {tokens}. With PEFT use the tokenizer in this folder{resize} first.\n"
        if tokens
        else ""
    )
    if tokens and not decoder.product_only:
        first += "\nFor other tools merge it: PEFT leaves out the bias of this head beside trained rows.\n"
    return f"""---
library_name: peft
base_model: {base}
tags: [lora, lorimer]
---

# LoRA adapter for {base}

Trained with lorimer: r {config["r"]}, alpha {config["lora_alpha"]}, on
{", ".join([*(config["target_modules"] or []), *(config["target_parameters"] or [])][:8])}.

    lorimer chat FOLDER          answer with it
    lorimer merge FOLDER --out M a full model

In Python with PEFT: `PeftModel.from_pretrained(base_model, FOLDER)`.
{first}`lorimer.json` says which base, template and data it belongs to.
"""


def trainable_line(adapter: Adapter, base_parameters: int) -> str:
    """PEFT's line: `trainable params: 4,884,480 || all params: 139,399,488 || trainable%: 3.5039`."""
    trained = adapter.parameters
    total = base_parameters + trained
    share = 100 * trained / total
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
