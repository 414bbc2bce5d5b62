"""Every setting of a run, written once: its name, type, default, bounds and help.

The command line, the docs, `lorimer config explain` and the JSON Schema are made from these
classes. A run's settings come from `read_config` (a YAML file and `key=value` overrides) or
`config_from` (a dict), and go back to YAML with `dump_yaml`. All raise ConfigError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined

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
        description="Training rows: a file (JSONL, JSON, CSV, Parquet), a list of files, or a hub id."
    )
    valid: str | None = Field(None, description="Validation rows: a file or a hub id.")
    test: str | None = Field(None, description="Held-out rows for the before/after proof.")
    valid_fraction: Fraction = Field(
        0.0, description="Share of the training rows set aside for validation if `valid` is not given."
    )
    test_fraction: Fraction = Field(
        0.0, description="Share of the training rows set aside for the proof if `test` is not given."
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
        None, description="System prompt put before chats that have none of their own."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file to use in place of the base's chat template."
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
        description="`all-linear`, `attention`, `mlp`, a list of module names, or one regex "
        "matched against the whole module path.",
    )
    layers: str | list[int] | None = Field(
        None, description="Which layers get adapters: a list, `8-15`, or `last:4`. All if not given."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Which biases are trained: none, all, or those of the adapted modules."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (arXiv 2312.03732).")
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Modules trained in full and saved with the adapter: `embed_tokens`, `lm_head`, norms.",
    )
    adapter: str | None = Field(
        None, description="An adapter folder to start from; its r, alpha and targets are used."
    )


class TrainConfig(Block):
    epochs: float = Field(2.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(
        None, ge=1, description="Train for this many optimizer steps, whatever `epochs` says."
    )
    batch_size: int = Field(16, ge=1, description="Rows per optimizer step.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens computed at once; a step is split to fit, with the same gradient. "
        "Chosen from the memory there is if not given.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of the steps spent warming up.")
    warmup_steps: int | None = Field(None, ge=0, description="Steps spent warming up, instead of a share.")
    optimizer: Literal["adamw"] = Field("adamw", description="The optimizer.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (arXiv 1711.05101).")
    adam_beta1: Fraction = Field(0.9, description="Decay of AdamW's first moment.")
    adam_beta2: Fraction = Field(0.999, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's term against division by zero.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm; 0 does not clip.")
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over the vocabulary.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better validation loss."
    )
    eval_every: Every = Field(
        "epoch", description="Measure the validation loss every N steps, each epoch, or never."
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Type of the frozen weights and activations; auto is bf16 where native."
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")
    threads: int | None = Field(None, ge=1, description="CPU threads; all available if not given.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds order, initial adapter and dropout.")


class EvaluateConfig(Block):
    max_new_tokens: int = Field(256, ge=1, description="Longest generated answer in tokens.")
    batch_size: int = Field(32, ge=1, description="Answers generated side by side.")
    rows: int | None = Field(None, ge=1, description="Use only the first N held-out rows.")
    samples: int = Field(3, ge=0, description="Changed answers shown at the end of a run.")


class OutputConfig(Block):
    dir: str = Field("runs", description="Folder that holds the run folders.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="Name of this run's folder."
    )
    save_every: Every = Field("epoch", description="Save a checkpoint every N steps, each epoch, or never.")
    keep: int = Field(2, ge=1, description="Checkpoints kept besides the best.")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list, description="Also log to these; each is an extra to install."
    )


class RunConfig(Block):
    base: str = Field(description="The model to adapt: a kept name, a folder, a .gguf file, or a hub id.")
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig, validate_default=True)
    train: TrainConfig = Field(default_factory=TrainConfig, validate_default=True)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, validate_default=True)
    output: OutputConfig = Field(default_factory=OutputConfig, validate_default=True)


# --- a file, overrides or a dict -> RunConfig ---------------------------------------------------

# Settings that may name files: taken from the config file's folder if there, else from the current one.
PATHS = ("base", "data.train", "data.valid", "data.test", "data.chat_template", "lora.adapter")
ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst")


def read_config(
    path: str | Path, overrides: Sequence[str] = (), *, need_files: bool = True
) -> RunConfig:
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
        return ConfigError(problem, fix=fix, path=self.path, line=self.path and self.line(place) or None)


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
    """Set one `a.b=value` in the settings; the value is read as YAML."""
    name, sign, raw = text.partition("=")
    place = tuple(part.strip() for part in name.split("."))
    if not sign or not all(place):
        raise ConfigError(
            f"`{text}` is not a setting (wanted: KEY=VALUE)", fix="For example: train.learning_rate=2e-4"
        )
    try:
        found = read_yaml(raw)[0] if raw[:1] in ("[", "{", '"', "'") else scalar(raw)
    except ConfigError as error:
        raise ConfigError(f"`{text}`: the value {error.problem}", fix="Put it in quotes.") from error
    block: Any = value
    for i, part in enumerate(place[:-1]):
        if not isinstance(block.setdefault(part, {}), dict):
            if issubclass(_block_at(place[: i + 1]) or Block, RunConfig) or _block_at(place[: i + 1]) is None:
                raise _unknown(place, source, override=text)
            block[part] = {}
        block = block[part]
    block[place[-1]] = found
    source.overrides[place] = text


def _block_at(place: Place) -> type[Block] | None:
    """The class of the block at a place, or None if there is no block there."""
    model: type[Block] = RunConfig
    for part in place:
        field = model.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, Block)):
            return None
        model = kind
    return model
