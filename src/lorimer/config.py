"""Every setting of a run, written once: its name, type, default, bounds and help.

The command line, the docs, `lorimer config explain` and the JSON Schema are made from these
classes. A run's settings come from `read_config` (a YAML file and `key=value` overrides) or
`config_from` (a dict), and go back to YAML with `dump_yaml`. All raise ConfigError.
"""

from __future__ import annotations

import difflib
import os
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lorimer.errors import ConfigError
from lorimer.other_names import OTHER_NAMES
from lorimer.yaml_text import Lines, Place, read_yaml, scalar, write_yaml

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Every = Annotated[int, Field(ge=1)] | Literal["epoch", "never"]


class Block(BaseModel):
    """A group of settings. Unknown names are errors, so a typo cannot pass in silence."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


class DataConfig(Block):
    train: str | list[str] = Field(
        examples=["train.jsonl"],
        description="Training rows: a file (JSONL, JSON, CSV, Parquet), a list of files, or a hub id.",
    )
    valid: str | None = Field(
        None, examples=["valid.jsonl"], description="Validation rows: a file or a hub id."
    )
    test: str | None = Field(
        None, examples=["test.jsonl"], description="Held-out rows for the before/after proof."
    )
    valid_fraction: Fraction = Field(
        0.0,
        examples=[0.05],
        description="Share of the training rows set aside for validation if `valid` is not given.",
    )
    test_fraction: Fraction = Field(
        0.0,
        examples=[0.05],
        description="Share of the training rows set aside for the proof if `test` is not given.",
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "completion", "text"] = Field(
        "auto", description="How a row is read; `auto` looks at its keys."
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="Which tokens are trained: every answer, the last answer, or all."
    )
    max_tokens: int = Field(1024, ge=8, description="Longest row in tokens.")
    too_long: Literal["error", "drop", "truncate"] = Field(
        "drop", description="What happens to a longer row: stop, leave it out, or cut its end."
    )
    system: str | None = Field(
        None,
        examples=["Answer in one word."],
        description="System prompt put before chats that have none of their own.",
    )
    chat_template: str | None = Field(
        None,
        examples=["chat.jinja"],
        description="A Jinja file to use in place of the base's chat template.",
    )
    pack: bool = Field(
        True, description="Pack rows without padding; false computes each row alone (slower, same losses)."
    )
    shuffle: bool = Field(True, description="Shuffle the rows anew in each epoch, by the seed.")

    @model_validator(mode="after")
    def _splits(self) -> DataConfig:
        if self.valid and self.valid_fraction:
            raise ValueError("`valid` and `valid_fraction` exclude each other: give one")
        if self.test and self.test_fraction:
            raise ValueError("`test` and `test_fraction` exclude each other: give one")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("`valid_fraction` and `test_fraction` together leave nothing to train on")
        return self


class LoraConfig(Block):
    r: int = Field(16, ge=1, le=4096, description="Rank of the update (LoRA paper, section 4.1).")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input during training.")
    target_modules: str | list[str] = Field(
        "all-linear",
        examples=[["q_proj", "v_proj"]],
        description="`all-linear`, `attention`, `mlp`, a list of module names, or one regex "
        "matched against the whole module path.",
    )
    layers: str | list[int] | None = Field(
        None,
        examples=["last:4"],
        description="Which layers get adapters: a list, `8-15`, or `last:4`. All if not given.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Which biases are trained: none, all, or those of the adapted modules."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (arXiv 2312.03732).")
    modules_to_save: list[str] = Field(
        default_factory=list,
        examples=[["lm_head"]],
        description="Modules trained in full and saved with the adapter: `embed_tokens`, `lm_head`, norms.",
    )
    adapter: str | None = Field(
        None,
        examples=["runs/home/adapter"],
        description="An adapter folder to start from; its r, alpha and targets are used.",
    )


class TrainConfig(Block):
    epochs: float = Field(2.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(
        None,
        ge=1,
        examples=[100],
        description="Train for this many optimizer steps, whatever `epochs` says.",
    )
    batch_size: int = Field(16, ge=1, description="Rows per optimizer step.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        examples=[2048],
        description="Most tokens computed at once; a step is split to fit, with the same gradient. "
        "Chosen from the memory there is if not given.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of the steps spent warming up.")
    warmup_steps: int | None = Field(
        None, ge=0, examples=[10], description="Steps spent warming up, instead of a share."
    )
    optimizer: Literal["adamw"] = Field("adamw", description="The optimizer.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (arXiv 1711.05101).")
    adam_beta1: Fraction = Field(0.9, description="Decay of AdamW's first moment.")
    adam_beta2: Fraction = Field(0.999, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's term against division by zero.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm; 0 does not clip.")
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over the vocabulary.")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        examples=[3],
        description="Stop after this many evaluations without a better validation loss.",
    )
    eval_every: Every = Field(
        "epoch", description="Measure the validation loss every N steps, each epoch, or never."
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Type of the frozen weights and activations; auto is bf16 where native."
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")
    threads: int | None = Field(
        None, ge=1, examples=[2], description="CPU threads; all available if not given."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds order, initial adapter and dropout.")


class EvaluateConfig(Block):
    max_new_tokens: int = Field(256, ge=1, description="Longest generated answer in tokens.")
    batch_size: int = Field(32, ge=1, description="Answers generated side by side.")
    rows: int | None = Field(None, ge=1, examples=[50], description="Use only the first N held-out rows.")
    samples: int = Field(3, ge=0, description="Changed answers shown at the end of a run.")


class OutputConfig(Block):
    dir: str = Field("runs", description="Folder that holds the run folders.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        examples=["home"],
        description="Name of this run's folder.",
    )
    save_every: Every = Field("epoch", description="Save a checkpoint every N steps, each epoch, or never.")
    keep: int = Field(2, ge=1, description="Checkpoints kept besides the best.")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list,
        examples=[["tensorboard"]],
        description="Also log to these; each is an extra to install.",
    )


class RunConfig(Block):
    base: str = Field(
        examples=["smollm2-135m"],
        description="The model to adapt: a kept name, a folder, a .gguf file, or a hub id.",
    )
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)


# --- a file, overrides or a dict -> RunConfig ---------------------------------------------------

# Settings that may name files: taken from the config file's folder if there, else from the current one.
PATHS = ("base", "data.train", "data.valid", "data.test", "data.chat_template", "lora.adapter")
ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst")


def read_config(path: str | Path, overrides: Sequence[str] = (), *, need_files: bool = True) -> RunConfig:
    """The settings of a YAML file, with `key=value` overrides put over them.

    Paths in the file are relative to its folder if they exist there, else to the current folder;
    paths in overrides are relative to the current folder. All come out absolute. With `need_files` a
    path that is in neither place is an error. Raises ConfigError with file and line.
    """
    path = Path(path)
    value, lines = read_yaml(_read_text(path), str(path))
    if not isinstance(value, dict):
        raise ConfigError(
            f"this is {_found(value)} (wanted: settings)", fix="Begin with `base: smollm2-135m`.", path=path
        )
    source = _Source(str(path), lines)
    for text in overrides:
        _put_override(value, text, source)
    config = _build(value, source)
    return _with_paths(config, source, path.absolute().parent, need_files)


def config_from(value: Mapping[str, Any], *, need_files: bool = True) -> RunConfig:
    """The settings in a dict of the same shape; paths are relative to the current folder."""
    source = _Source(None, {})
    return _with_paths(_build(_plain(value), source), source, Path.cwd(), need_files)


def dump_yaml(config: RunConfig) -> str:
    """Every setting as YAML; `read_config` reads it back equal."""
    return write_yaml(config.model_dump())


class _Source:
    """Where each setting came from, for messages: a line of a file, or an override."""

    def __init__(self, path: str | None, lines: Lines) -> None:
        self.path, self.lines = path, lines
        self.overrides: dict[Place, str] = {}

    def override_of(self, place: Place) -> str | None:
        """The override that set this place, if one did."""
        return next((self.overrides[p] for p in _upwards(place) if p in self.overrides), None)

    def line(self, place: Place) -> int | None:
        return next((self.lines[p] for p in _upwards(place) if p in self.lines), None)

    def error(self, place: Place, problem: str, fix: str | None = None) -> ConfigError:
        override = self.override_of(place)
        if override is not None:
            return ConfigError(f"`{override}`: {problem}", fix=fix)
        return ConfigError(problem, fix=fix, path=self.path, line=self.line(place) if self.path else None)


def _upwards(place: Place) -> Iterator[Place]:
    yield from (place[:length] for length in range(len(place), -1, -1))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(file.name for file in path.absolute().parent.glob("*.y*ml")) if path.name else []
        close = difflib.get_close_matches(path.name, near, 1)
        fix = f"Did you mean `{path.parent / close[0]}`?" if close else "Give the path of a YAML file."
        raise ConfigError("there is no such config file", fix=fix, path=path) from error
    except IsADirectoryError as error:
        fix = "Give the YAML file in it; a run goes on with: lorimer train --resume RUN"
        raise ConfigError("this is a folder (wanted: a config file)", fix=fix, path=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError("this is not UTF-8 text", fix="Save it as UTF-8.", path=path) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path=path) from error


def _put_override(value: dict[str, Any], text: str, source: _Source) -> None:
    """Set one `a.b=value` in the settings; a list, a mapping or quoted text is read as YAML."""
    name, sign, raw = text.partition("=")
    place = tuple(part.strip() for part in name.split("."))
    if not sign or not all(place):
        raise ConfigError(
            f"`{text}` is not a setting (wanted: KEY=VALUE)", fix="For example: train.learning_rate=2e-4"
        )
    try:
        found = read_yaml(raw)[0] if raw[:1] in ("[", "{", '"', "'") else scalar(raw)
    except ConfigError as error:
        raise ConfigError(f"`{text}`: {error.problem}", fix="Put quotes around plain text.") from error
    source.overrides[place] = text
    block = value
    for i, part in enumerate(place[:-1]):
        if block.get(part) is None:
            block[part] = {}
        block = block[part]
        if not isinstance(block, dict):
            inner = ".".join(place[: i + 1])
            raise ConfigError(f"`{text}`: there are no settings inside `{inner}`")
    block[place[-1]] = found


def _plain(value: Any) -> Any:
    """Paths as text, tuples as lists: what a YAML file could hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- checking, and what is said about wrong names and values ------------------------------------


@dataclass(frozen=True, slots=True)
class _Problem:
    place: Place
    text: str
    fix: str | None = None


def _build(value: dict[str, Any], source: _Source) -> RunConfig:
    value = {k: {} if v is None and k in BLOCKS else v for k, v in value.items()}
    problems = list(_wrong_names(value))
    if not problems:
        try:
            return RunConfig.model_validate(value, strict=True)
        except ValidationError as error:
            problems = list(_wrong_values(error))
    first, *others = sorted(problems, key=lambda problem: source.line(problem.place) or 0)
    notes = [first.fix] if first.fix else []
    for problem in others[:5]:
        other = source.error(problem.place, problem.text)
        where = f", line {other.line}" if other.line else ""
        notes.append(f"also{where}: {other.problem}{f'. {problem.fix}' if problem.fix else ''}")
    raise source.error(first.place, first.text, "\n  ".join(notes) or None)


def _wrong_names(value: Mapping[Any, Any]) -> Iterator[_Problem]:
    for key, inner in value.items():
        if key not in RunConfig.model_fields:
            yield _unknown((str(key),))
        elif key in BLOCKS and isinstance(inner, Mapping):
            known = BLOCKS[key].model_fields
            yield from (_unknown((key, str(name))) for name in inner if name not in known)


def _unknown(place: Place) -> _Problem:
    """What a name that is not ours was meant to be."""
    name = str(place[-1])
    plain = name.strip().lower().replace("-", "_")
    return _Problem(place, f"there is no setting `{'.'.join(map(str, place))}`", _meant(plain, place))


def _meant(name: str, place: Place) -> str:
    if name in SETTINGS:
        return f"A dot does not nest in YAML. Write {_how(name)}."
    ours = [key for key in SETTINGS if key.rpartition(".")[2] == name and key != ".".join(map(str, place))]
    if ours:
        return f"Write it as {' or '.join(f'`{key}`' for key in ours)}: {_how(ours[0])}."
    if name in OTHER_NAMES:
        answer, _, note = OTHER_NAMES[name].partition("; ")
        if answer.startswith("no: "):
            return f"Leave it out: {OTHER_NAMES[name].removeprefix('no: ')}."
        return f"Its name here is `{answer}`: {note or _how(answer)}."
    block = BLOCKS.get(str(place[0])) if len(place) > 1 else RunConfig
    near = list(block.model_fields) if block else []
    if close := difflib.get_close_matches(name, near, 1):
        return f"Did you mean `{'.'.join([*map(str, place[:-1]), close[0]])}`?"
    leaves = {key.rpartition(".")[2]: key for key in SETTINGS}
    if close := difflib.get_close_matches(name, [*leaves, *OTHER_NAMES], 1, cutoff=0.75):
        return f"Did you mean `{leaves[close[0]]}`?" if close[0] in leaves else _meant(close[0], ("",))
    return f"Known here: {', '.join(near or RunConfig.model_fields)}."


def _how(key: str) -> str:
    """How a setting is written in a file."""
    block, _, name = key.rpartition(".")
    return f"`{name}` in the block `{block}`" if block else "at the top of the file"


def _wrong_values(error: ValidationError) -> Iterator[_Problem]:
    """One problem for each setting; a union's members each complain of the same one."""
    found: dict[Place, ErrorDetails] = {}
    for item in error.errors(include_url=False):
        place = item["loc"][: 2 if item["loc"][0] in BLOCKS else 1]
        # The complaint about an item of a list says more than that about the list.
        if place not in found or isinstance(item["loc"][-1], int):
            found[place] = item
    yield from (_wrong_value(place, item) for place, item in found.items())


def _wrong_value(place: Place, item: ErrorDetails) -> _Problem:
    value = item["input"]
    key = ".".join(map(str, place))
    if item["type"] == "missing":
        example = SETTINGS[key].examples[0] if key in SETTINGS else "{train: train.jsonl}"
        return _Problem(place, f"`{key}` is not given", f"Add for example: {key.split('.')[-1]}: {example}")
    if item["type"] == "value_error":
        return _Problem(place, item["msg"].removeprefix("Value error, "))
    if key not in SETTINGS:
        return _Problem(place, f"`{key}` is {_found(value)} (wanted: a block of settings)")
    said = f"has {_found(value)} in its list" if isinstance(item["loc"][-1], int) else f"is {_found(value)}"
    text = f"`{key}` {said} (wanted: {SETTINGS[key].wanted})"
    return _Problem(place, text, _value_fix(value, item["type"]))


def _value_fix(value: Any, kind: str) -> str | None:
    if kind == "string_type" and isinstance(value, int | float):
        return f'Put it in quotes: "{value}".'
    if kind == "bool_type" and str(value).lower() in ("yes", "no", "on", "off"):
        return "Write true or false."
    if isinstance(value, str) and kind != "string_type" and not isinstance(scalar(value), str):
        return "Take the quotes away."
    return None


def _found(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a block of settings"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    return repr(value)


# --- paths --------------------------------------------------------------------------------------


def _with_paths(config: RunConfig, source: _Source, folder: Path, need_files: bool) -> RunConfig:
    """The same settings with every path that exists made absolute."""
    value = config.model_dump()
    for key in PATHS:
        block, _, name = key.rpartition(".")
        holder = value[block] if block else value
        given = holder[name]
        place: Place = tuple(key.split("."))
        folders = [Path.cwd()] if source.override_of(place) else list(dict.fromkeys([folder, Path.cwd()]))
        if isinstance(given, list):
            holder[name] = [_found_path(key, text, folders, source, need_files) for text in given]
        elif given is not None:
            holder[name] = _found_path(key, given, folders, source, need_files)
    return RunConfig.model_validate(value)


def _found_path(key: str, text: str, folders: list[Path], source: _Source, need_files: bool) -> str:
    for folder in folders:
        path = folder / Path(text).expanduser()
        if not path.exists() or (key == "base" and not _is_base(text, path)):
            continue
        # `runs/last` moves on, so what it stands for is kept; a data file may be a link without suffix.
        return str(path.resolve()) if key == "lora.adapter" else os.path.abspath(path)
    if need_files and _means_file(key, text):
        names = [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()]
        close = difflib.get_close_matches(Path(text).name, names, 1, cutoff=0.75)
        looked = " nor in ".join(str(folder) for folder in folders)
        fix = f"Did you mean `{close[0]}`? " if close else ""
        if len(folders) > 1:
            fix += "Paths are taken from the folder of the config file, then from the current folder."
        absolute = Path(text).expanduser().is_absolute()
        where = "" if absolute else f": it is {'neither' if len(folders) > 1 else 'not'} in {looked}"
        raise source.error(
            tuple(key.split(".")), f"`{key}`: there is no `{text}`{where}", fix.strip() or None
        )
    return text


def _is_base(text: str, path: Path) -> bool:
    """Whether a base's name means this path: a plain name may also be that of a kept base."""
    return _means_file("base", text) or (path / "config.json").is_file()


def _means_file(key: str, text: str) -> bool:
    """Whether a text can only be a path, not a name or a hub id."""
    if key in ("data.chat_template", "lora.adapter") or text.startswith((".", "/", "~")):
        return True
    return text.lower().endswith(".gguf" if key == "base" else ROW_FILES)


# --- what the help, the docs and the messages say -----------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it is documented; `default` is None where there is none or it is not set."""

    key: str
    description: str
    wanted: str
    required: bool
    default: Any
    examples: list[Any]


def _settings() -> dict[str, Setting]:
    found = {}
    models: dict[str, type[Block]] = {"": RunConfig, **BLOCKS}
    for block, model in models.items():
        properties = model.model_json_schema()["properties"]
        for name, field in model.model_fields.items():
            if not block and name in BLOCKS:
                continue
            key = f"{block}.{name}" if block else name
            required = field.is_required()
            default = None if required else field.get_default(call_default_factory=True)
            examples = field.examples or [default]
            found[key] = Setting(
                key, field.description or "", _wanted(properties[name]), required, default, examples
            )
    return found


def _wanted(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema asks for, in words."""
    if "anyOf" in schema:
        return " or ".join(_wanted(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(schema.get("enum") or [schema["const"]])
    if schema["type"] == "array":
        return f"a list ({_wanted(schema['items'])})"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    if schema["type"] == "string":
        return f"text that matches {schema['pattern']}" if "pattern" in schema else "text"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " ".join(
        [words[schema["type"]], *(f"{w} {schema[k]:g}" for k, w in bounds.items() if k in schema)]
    )


BLOCKS: dict[str, type[Block]] = {
    "data": DataConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "output": OutputConfig,
}
SETTINGS: dict[str, Setting] = _settings()


def explain(key: str) -> str:
    """A setting, or all settings of a block, as text. Raises ConfigError with the nearest name."""
    if key in BLOCKS:
        return "\n\n".join(explain(name) for name in SETTINGS if name.startswith(f"{key}."))
    if key not in SETTINGS:
        return _explain_other(key)
    setting = SETTINGS[key]
    default = "required" if setting.required else f"default: {_shown(setting.default)}"
    example = f"{key}={_shown(setting.examples[0])}"
    lines = [
        key,
        *textwrap.wrap(setting.description, 70, initial_indent="  ", subsequent_indent="  "),
        f"  value: {setting.wanted}",
        f"  {default}",
        f"  example: lorimer train config.yaml {shlex.quote(example) if ' ' in example else example}",
    ]
    return "\n".join(lines)


def _explain_other(key: str) -> str:
    """The settings whose last part is `key`, or the answer to another tool's name."""
    if ours := [name for name in SETTINGS if name.rpartition(".")[2] == key]:
        return "\n\n".join(explain(name) for name in ours)
    problem = _unknown(tuple(key.split(".")))
    answer = OTHER_NAMES.get(key)
    if answer is None:
        raise ConfigError(problem.text, fix=problem.fix)
    text = "\n".join(
        [key, *textwrap.wrap(problem.fix or "", 70, initial_indent="  ", subsequent_indent="  ")]
    )
    name = answer.partition(";")[0]
    return f"{text}\n\n{explain(name)}" if name in SETTINGS else text


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return write_yaml(value).removesuffix("...\n").strip()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()
