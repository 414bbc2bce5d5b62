"""Every setting of a run, written once: its name, type, default, bounds and help.

The command line, the docs, `lorimer config explain` and the JSON Schema are made from these classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorimer.config.presets import PRESETS

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PRESET_NAMES = tuple(PRESETS)
DURATION = r"^(\d+h(\d+m)?(\d+s)?|\d+m(\d+s)?|\d+s)$"
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
Duration = Annotated[
    str,
    Field(pattern=DURATION, json_schema_extra={"wanted": "a time as 3h, 1h30m or 120s"}),
]
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
    add_tokens: list[str] = Field(
        default_factory=list,
        examples=[["<tool>", "</tool>"]],
        description="Tokens that the base does not have, found wherever the texts of rows hold them; their "
        "embeddings are trained.",
    )
    add_special_tokens: list[str] = Field(
        default_factory=list,
        examples=[["<|turn|>"]],
        description="The same as control tokens: only the chat template writes them, and answers are shown "
        "without them.",
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
        "matched against the whole module path. `embed_tokens` and `lm_head` must be named.",
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


class QuantConfig(Block):
    """How the frozen weights are stored; written as one word, it is the kind."""

    kind: Literal["none", "nf4", "fp4", "int8", "keep"] = Field(
        "none",
        description="How frozen weights are stored: as they are computed with, in 4 or 8 bits, or as the "
        "base has them (the blocks of a GGUF file, a bitsandbytes checkpoint). `quant: nf4` says the same.",
    )
    block_size: int = Field(
        64, description="nf4, fp4: numbers that share a scale, a power of two from 64 to 4096."
    )
    double: bool = Field(
        True, description="nf4, fp4: quantise the scales too (QLoRA, arXiv 2305.14314, section 3)."
    )
    embeddings: bool = Field(
        False, description="Embedding and head too: less memory, a little slower, a little less exact."
    )

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if not 64 <= value <= 4096 or value & (value - 1):
            raise ValueError(f"`quant.block_size` is {value} (wanted: a power of two from 64 to 4096)")
        return value


# Settings that only some optimizers read.
READ_BY = {
    "adam_beta1": ("adamw", "adamw_8bit", "paged_adamw", "lion"),
    "adam_beta2": ("adamw", "adamw_8bit", "paged_adamw", "lion"),
    "adam_epsilon": ("adamw", "adamw_8bit", "paged_adamw"),
    "momentum": ("sgd",),
    "loraplus_lr_ratio": ("adamw", "adamw_8bit", "paged_adamw", "lion", "sgd"),
}


class TrainConfig(Block):
    epochs: float = Field(2.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        examples=[100],
        description="Train for this many optimizer steps, whatever `epochs` says.",
    )
    budget: Duration | None = Field(
        None,
        examples=["1h30m"],
        description="Time for the whole run, as 3h, 90m or 120s: the schedule fits it, whatever `epochs` "
        "says.",
    )
    batch_size: int = Field(16, ge=1, description="Rows per optimizer step.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        examples=[2048],
        description="Most tokens computed at once; a step is split to fit, with the same gradient. "
        "Chosen from the memory there is if not given.",
    )
    recompute: Literal["auto", "none", "mlp", "layers", "offload"] = Field(
        "auto",
        description="What the backward computes again to save memory: nothing, gate and up, whole "
        "layers, or layers whose inputs leave for the host or a file. auto takes the first that fits. "
        "The gradients are the same.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        le=100,
        description="LoRA+: B's learning rate over A's, which is `learning_rate` (arXiv 2402.12354); 4 to "
        "16 learn faster.",
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of the steps spent warming up.")
    warmup_steps: int | None = Field(
        None, ge=0, examples=[10], description="Steps spent warming up, instead of a share."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "lion", "sgd", "adafactor"] = Field(
        "adamw",
        description="The optimizer; adamw_8bit has a quarter of its state, paged_adamw is for CUDA.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (arXiv 1711.05101).")
    adam_beta1: Fraction = Field(0.9, description="Decay of the first moment (AdamW, Lion).")
    adam_beta2: Fraction = Field(
        0.999, description="Decay of AdamW's second moment, and of what Lion keeps; 0.99 there."
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's term against division by zero.")
    momentum: Fraction = Field(0.9, description="SGD's momentum.")
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
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Type of the frozen weights and activations; auto is bf16 where native, else fp16 on a "
        "GPU and fp32 on a CPU. fp16 scales the loss, and is slow on CPUs.",
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")
    threads: int | None = Field(
        None, ge=1, le=4096, examples=[2], description="CPU threads; all available if not given."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds order, initial adapter and dropout.")

    @model_validator(mode="after")
    def _read_by_the_optimizer(self) -> TrainConfig:
        """A setting that the chosen optimizer does not read is an error unless it is as it comes."""
        for name, readers in READ_BY.items():
            if (
                self.optimizer not in readers
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(
                    f"`train.{name}` is not read by the optimizer {self.optimizer} (it is by: "
                    f"{', '.join(readers)})"
                )
        return self


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
        json_schema_extra={"wanted": "a name of letters, digits, dots, dashes and underscores"},
        examples=["home"],
        description="Name of this run's folder.",
    )
    save_every: Every | Duration = Field(
        "epoch",
        examples=["10m"],
        description="Save a checkpoint every N steps, after a time (10m), each epoch, or never.",
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept besides the best.")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list,
        examples=[["tensorboard"]],
        description="Also log to these; each is an extra to install.",
    )

    @field_validator("name")
    @classmethod
    def _free(cls, value: str | None) -> str | None:
        """`last` is the link to the newest run; Windows has no folders with the names of devices."""
        if value and (value.lower() == "last" or DEVICE.fullmatch(value) or value.endswith(".")):
            raise ValueError(
                f"`output.name` is {value!r}, which is kept for something else (wanted: another)"
            )
        return value


class RunConfig(Block):
    base: str = Field(
        examples=["smollm2-135m"],
        description="The model to adapt: a kept name, a folder, a .gguf file, or a hub id.",
    )
    preset: list[Literal[PRESET_NAMES]] = Field(  # type: ignore[valid-type]
        default_factory=list,
        examples=[["low-memory", "classification"]],
        description="Sets of settings that go under the others; `lorimer config explain low-memory` shows "
        "one.",
    )
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    quant: QuantConfig = Field(default_factory=QuantConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)


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
    if "wanted" in schema:
        return str(schema["wanted"])
    if "anyOf" in schema:
        return " or ".join(_wanted(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _listed(schema.get("enum") or [schema["const"]])
    if schema["type"] == "array":
        return f"a list ({_wanted(schema['items'])})"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    if schema["type"] == "string":
        if "pattern" not in schema:
            return "text"
        return f"text that matches {schema['pattern']}"
    bounds = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "to below",
    }
    return " ".join(
        [words[schema["type"]], *(f"{w} {schema[k]}" for k, w in bounds.items() if k in schema)]
    )


def _listed(names: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


BLOCKS: dict[str, type[Block]] = {
    "data": DataConfig,
    "lora": LoraConfig,
    "quant": QuantConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "output": OutputConfig,
}
# Blocks that may be written as one word, and the setting that it is.
SHORT = {"quant": "kind"}
SETTINGS: dict[str, Setting] = _settings()
