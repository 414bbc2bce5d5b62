"""Settings: YAML and overrides in, RunConfig or one clear message out."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from lorimer.config import (
    BLOCKS,
    SETTINGS,
    RunConfig,
    config_from,
    dump_yaml,
    explain,
    json_schema,
    read_config,
)
from lorimer.config.other_names import OTHER_NAMES
from lorimer.config.yaml_text import read_yaml, scalar, write_yaml
from lorimer.errors import ConfigError

BASE = "base: smollm2-135m\ndata: {train: train.jsonl}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a data file in it and a folder `sub` for config files."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *overrides: str) -> RunConfig:
    Path("sub/c.yaml").write_text(text, encoding="utf-8")
    return read_config("sub/c.yaml", overrides)


def refused(text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return caught.value


# --- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("1_000", 1000),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-11-22", "2026-11-22"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("null", None),
        ("~", None),
        ("", None),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("last:4", "last:4"),
        ("9" * 200, "9" * 200),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_quoted_text_stays_text() -> None:
    assert read_yaml("a: '2e-4'\nb: \"true\"\nc: |\n  3\n")[0] == {"a": "2e-4", "b": "true", "c": "3\n"}


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "`c` is given twice, first on line 3"),
        ("a: 1\n\tb: 2\n", 2, "not YAML"),
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not YAML"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", 2, "tag"),
        ("a: 1\n[1, 2]: 3\n", 2, "must be text"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(text: str, line: int, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        read_yaml(text, "c.yaml")
    assert (caught.value.path, caught.value.line) == ("c.yaml", line)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "e: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]",
        "[" * 5000,
    ],
)
def test_yaml_that_unfolds_without_end_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        read_yaml(text)


@pytest.mark.parametrize(
    "value",
    [
        "2e-4",
        "yes",
        "null",
        "true",
        "010",
        "",
        " x",
        "a: b",
        "#c",
        "ü\n\t",
        "\x07",
        "- a",
        "~",
        "'",
        1e-8,
        3,
        True,
    ],
)
def test_what_is_written_is_read_back(value: object) -> None:
    back = read_yaml(write_yaml({"k": value}))[0]["k"]
    assert back == value
    assert type(back) is type(value)


# --- a file -------------------------------------------------------------------------------------


def test_defaults_and_given_values(here: Path) -> None:
    config = read(BASE + "train: {learning_rate: 1e-3}\nlora:\n")
    assert config.train.learning_rate == 1e-3
    assert (config.lora.r, config.lora.alpha, config.train.batch_size) == (16, 32.0, 16)


def test_the_resolved_config_reads_back_equal(here: Path) -> None:
    config = read(BASE, 'output.name="2e-4"', "data.system=yes: or #no\nmaybe", "train.adam_epsilon=1e-9")
    Path("other").mkdir()
    Path("other/config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    os.chdir("other")
    assert read_config("config.yaml") == config


@pytest.mark.parametrize("prefix", ["\ufeff", ""])
def test_a_byte_order_mark_and_crlf_are_read(here: Path, prefix: str) -> None:
    Path("c.yaml").write_bytes((prefix + BASE).replace("\n", "\r\n").encode())
    assert read_config("c.yaml").base == "smollm2-135m"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"[1, 2]", "a list"),
        (b"smollm2", "the text 'smollm2'"),
        ("base: x".encode("utf-16"), "not UTF-8"),
        (b"base: \x00", "not YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(here: Path, content: bytes, part: str) -> None:
    Path("c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=part) as caught:
        read_config("c.yaml")
    assert caught.value.path == "c.yaml"


def test_a_missing_file_names_the_nearest(here: Path) -> None:
    Path("home.yaml").touch()
    with pytest.raises(ConfigError, match=r"Did you mean `home\.yaml`"):
        read_config("hme.yaml")
    with pytest.raises(ConfigError, match="--resume"):
        read_config("sub")


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("lora: {r: sixteen}", 3, "`lora.r` is the text 'sixteen' (wanted: a whole number from 1 to 4096)"),
        ("lora:\n  r: '16'", 4, "Take the quotes away"),
        ("lora: {r: 16.0}", 3, "`lora.r` is 16.0"),
        ("lora: {r: true}", 3, "`lora.r` is true"),
        ("lora: {r: 0}", 3, "`lora.r` is 0"),
        ("train: {epochs: two}", 3, "`train.epochs` is the text 'two' (wanted: a number above 0)"),
        ("train: {learning_rate: .nan}", 3, "`train.learning_rate` is nan"),
        ("train: {learning_rate: .inf}", 3, "`train.learning_rate` is inf"),
        ("train: {epochs: null}", 3, "`train.epochs` is empty"),
        ("train: [1]", 3, "`train` is a list (wanted: a block of settings)"),
        ("train: {lr_scheduler: cosin}", 3, "wanted: cosine, linear, constant or constant_with_warmup"),
        (
            "train: {eval_every: 0}",
            3,
            "`train.eval_every` is 0 (wanted: a whole number from 1 or epoch or never)",
        ),
        ("output: {name: ../x}", 3, "`output.name` is the text '../x'"),
        ("output: {name: 2026}", 3, 'Put it in quotes: "2026"'),
        ("output: {trackers: [tb]}", 3, "`output.trackers` has the text 'tb' in its list"),
    ],
)
def test_a_wrong_value_says_what_was_found_and_wanted(here: Path, text: str, line: int, part: str) -> None:
    error = refused(BASE + text)
    assert part in str(error)
    assert (error.path, error.line) == ("sub/c.yaml", line)


def test_a_boolean_written_as_yes_is_told_true_or_false(here: Path) -> None:
    error = refused("base: x\ndata:\n  train: train.jsonl\n  pack: yes\n")
    assert (error.line, error.fix) == (4, "Write true or false.")


def test_missing_settings_are_named_with_an_example(here: Path) -> None:
    assert "`base` is not given" in str(refused("data: {train: train.jsonl}"))
    assert "base: smollm2-135m" in str(refused("data: {train: train.jsonl}"))
    assert "`data.train` is not given" in str(refused("base: x\ndata: {}"))
    assert "`data` is not given" in str(refused("base: x"))


def test_settings_that_exclude_each_other(here: Path) -> None:
    error = refused("base: x\ndata: {train: train.jsonl, valid: train.jsonl, valid_fraction: 0.1}")
    assert error.problem == "`valid` and `valid_fraction` exclude each other: give one"


def test_all_problems_are_told_at_once_in_order_of_lines(here: Path) -> None:
    text = str(refused(BASE + "train:\n  epochs: two\n  batch_size: 0\n  max_steps: x\n"))
    places = [
        text.index(part)
        for part in ("c.yaml:4: `train.epochs`", "line 5: `train.batch", "line 6: `train.max")
    ]
    assert places == sorted(places)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora: {rr: 8}", "Did you mean `lora.r`?"),
        ("trian: {epochs: 1}", "Did you mean `train`?"),
        ("train: {batchsize: 1}", "Did you mean `train.batch_size`?"),
        ("learning_rate: 1", "Write it as `train.learning_rate`"),
        ("train: {r: 8}", "Write it as `lora.r`"),
        ("lora.r: 8", "A dot does not nest in YAML. Write `r` in the block `lora`."),
        ("xyz: 8", "Known here: base, preset, data, lora, quant, train, evaluate, output."),
        ("num_train_epochs: 3", "`train.epochs`"),
        ("train: {per_device_train_batch_size: 3}", "`train.batch_size`"),
        ("gradient_accumulation_steps: 3", "Leave it out: `train.batch_size` is already"),
        ("micro_batch_size: 3", "`train.batch_size`"),
        ("lora_alpha: 3", "`lora.alpha`"),
        ("lora: {lora_r: 3}", "`lora.r`"),
        ("target_modules: all-linear", "`lora.target_modules`"),
        ("use_rslora: true", "`lora.rslora`"),
        ("sequence_len: 3", "`data.max_tokens`"),
        ("cutoff_len: 3", "`data.max_tokens`"),
        ("base_model: x", "`base`"),
        ("model_name_or_path: x", "`base`"),
        ("datasets: [{path: x}]", "`data.train`"),
        ("val_set_size: 0.1", "`data.valid_fraction`"),
        ("output_dir: x", "`output.dir`"),
        ("lr_scheduler_type: linear", "`train.lr_scheduler`"),
        ("warmup_ratio: 0.1", "`train.warmup_ratio`"),
        ("bf16: true", "`train.dtype`"),
        ("fp16: true", "`train.dtype`"),
        ("load_in_4bit: true", "`quant.kind`"),
        ("bnb_4bit_quant_type: nf4", "`quant.kind`"),
        ("train: {quant: nf4}", "`quant` is a block of its own"),
        ("optim: adamw_torch", "`train.optimizer`"),
        ("sample_packing: true", "`data.pack`"),
        ("train_on_inputs: false", "`data.train_on`"),
        ("assistant_only_loss: true", "`data.train_on`"),
        ("neftune_noise_alpha: 5", "NEFTune is not offered"),
        ("label_smoothing_factor: 0.1", "`train.label_smoothing`"),
        ("gradient_checkpointing: true", "`train.recompute`"),
        ("report_to: wandb", "`output.trackers`"),
        ("save_steps: 5", "`output.save_every`"),
        ("eval_steps: 5", "`train.eval_every`"),
        ("logging_steps: 5", "Leave it out"),
        ("save_total_limit: 5", "`output.keep`"),
        ("Lora-Alpha: 3", "`lora.alpha`"),
        ("num_train_epoch: 3", "`train.epochs`"),
    ],
)
def test_a_name_that_is_not_ours_is_answered(here: Path, text: str, part: str) -> None:
    error = refused(BASE + text)
    assert part in str(error)
    assert error.line == 3


def test_every_answer_to_another_name_leads_to_a_setting_that_exists() -> None:
    for name, answer in OTHER_NAMES.items():
        ours = answer.partition(";")[0]
        assert answer.startswith("no: ") or ours in SETTINGS, name
        assert name not in {key.rpartition(".")[2] for key in SETTINGS} | set(BLOCKS) or "." not in name


# --- overrides ----------------------------------------------------------------------------------


def test_overrides_go_over_the_file(here: Path) -> None:
    Path("b.jsonl").touch()
    config = read(
        BASE + "train: {max_steps: 5}\n",
        "lora.r=32",
        "data.train=[train.jsonl, b.jsonl]",
        "train.max_steps=null",
        "train.learning_rate=2e-4",
        "data.system=a: b #c",
        'output.name="007"',
        "lora.target_modules=.*q_proj",
        "lora.r=64",
    )
    assert config.lora.r == 64
    assert config.data.train == [str(here / "train.jsonl"), str(here / "b.jsonl")]
    assert config.train.max_steps is None
    assert config.train.learning_rate == 2e-4
    assert config.data.system == "a: b #c"
    assert config.output.name == "007"
    assert config.lora.target_modules == ".*q_proj"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lora.rr=3", "Did you mean `lora.r`?"),
        ("lora_alpha=3", "Its name here is `lora.alpha`"),
        ("batch_size=3", "`train.batch_size` or `evaluate.batch_size`"),
        ("lora.r=x", "`lora.r` is the text 'x'"),
        ("lora.r", "wanted: KEY=VALUE"),
        ("=3", "wanted: KEY=VALUE"),
        ("base.x=3", "there are no settings inside `base`"),
        ("lora.r.x=3", "`lora.r` is a block of settings"),
        ("data.train=[a", "Put quotes around plain text"),
    ],
)
def test_a_wrong_override_is_quoted(here: Path, override: str, part: str) -> None:
    error = refused(BASE, override)
    assert part in str(error)
    assert f"`{override}`" in error.problem or error.line is not None


# --- paths --------------------------------------------------------------------------------------


def test_paths_are_taken_from_the_config_files_folder_first(here: Path) -> None:
    assert read(BASE).data.train == str(here / "train.jsonl")
    Path("sub/train.jsonl").touch()
    assert read(BASE).data.train == str(here / "sub/train.jsonl")
    assert read(BASE, "data.train=train.jsonl").data.train == str(here / "train.jsonl")


def test_a_path_that_is_nowhere_names_both_places(here: Path) -> None:
    error = refused("base: x\ndata:\n  train: trian.jsonl\n")
    assert error.line == 3
    assert f"neither in {here / 'sub'} nor in {here}" in error.problem
    assert "Did you mean `train.jsonl`?" in str(error)
    Path("c.yaml").write_text("base: x\ndata: {train: no.jsonl}", encoding="utf-8")
    assert read_config("c.yaml", need_files=False).data.train == "no.jsonl"


def test_names_and_hub_ids_stay_as_they_are(here: Path) -> None:
    Path("sub/smollm2-135m").mkdir()
    config = read("base: smollm2-135m\ndata: {train: someone/rows}\n")
    assert (config.base, config.data.train) == ("smollm2-135m", "someone/rows")
    Path("sub/smollm2-135m/config.json").touch()
    assert read(BASE).base == str(here / "sub/smollm2-135m")


@pytest.mark.parametrize(
    ("text", "overrides", "kind", "block_size"),
    [
        ("quant: nf4\n", [], "nf4", 64),
        ("quant: {kind: fp4, block_size: 128}\n", [], "fp4", 128),
        ("quant: nf4\n", ["quant.block_size=256"], "nf4", 256),
        ("quant: {kind: fp4, block_size: 128}\n", ["quant=nf4"], "nf4", 128),
        ("", ["quant=int8"], "int8", 64),
        ("", ["quant.kind=keep"], "keep", 64),
        ("quant:\n", [], "none", 64),
    ],
)
def test_storage_is_one_word_or_a_block(
    here: Path, text: str, overrides: list[str], kind: str, block_size: int
) -> None:
    config = read(BASE + text, *overrides)
    assert (config.quant.kind, config.quant.block_size) == (kind, block_size)
    assert read_config(Path("sub/c.yaml"), overrides) == config
    assert config_from({"base": "b", "data": {"train": "train.jsonl"}, "quant": "nf4"}).quant.kind == "nf4"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("quant: nf3\n", "`quant.kind` is the text 'nf3' (wanted: none, nf4, fp4, int8 or keep)"),
        ("quant: 4\n", "`quant` is 4 (wanted: a block of settings)"),
        ("quant: {kind: nf4, block_size: 100}\n", "a power of two from 64 to 4096"),
        ("quant: {kind: nf4, block_size: 32}\n", "a power of two from 64 to 4096"),
        ("load_in_4bit: true\n", "Its name here is `quant.kind`: write `quant: nf4`"),
    ],
)
def test_wrong_storage_is_refused_with_its_line(here: Path, text: str, part: str) -> None:
    error = refused(BASE + text)
    assert part in str(error)
    assert error.line == 3


def test_a_dict_is_read_like_a_file(here: Path) -> None:
    config = config_from({"base": "x", "data": {"train": (Path("train.jsonl"),)}, "lora": {"r": 4}})
    assert config.data.train == [str(here / "train.jsonl")]
    with pytest.raises(ConfigError, match=r"`lora\.alpha`"):
        config_from({"base": "x", "data": {"train": "train.jsonl"}, "lora_alpha": 4})


# --- documentation ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_explained(key: str) -> None:
    setting = SETTINGS[key]
    assert setting.description.endswith(".")
    text = explain(key)
    assert max(map(len, text.splitlines())) <= 100
    text = " ".join(text.split())
    for part in (setting.wanted, "example: lorimer train config.yaml"):
        assert part in text


@pytest.mark.parametrize("key", SETTINGS)
def test_every_example_is_accepted(here: Path, key: str) -> None:
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "chat.jinja"):
        Path(name).touch()
    Path("runs/home/adapter").mkdir(parents=True)
    command = explain(key).rpartition("example: ")[2]
    override = shlex.split(command)[-1]
    assert not override.endswith("=null"), "a setting that is not set by default needs an example"
    read(BASE, override)


def test_explain_answers_blocks_last_parts_and_other_names() -> None:
    assert "lora.r" in explain("lora")
    assert explain("rslora") == explain("lora.rslora")
    assert "train.batch_size" in explain("micro_batch_size")
    assert "NEFTune" in explain("neftune_noise_alpha")
    with pytest.raises(ConfigError, match=r"Did you mean `train\.batch_size`"):
        explain("train.batchsize")


def test_the_schema_takes_one_word_for_a_block() -> None:
    block, word = json_schema()["properties"]["quant"]["anyOf"]
    assert "$ref" in str(block)
    assert word["enum"] == ["none", "nf4", "fp4", "int8", "keep"]


def test_the_schema_refuses_unknown_names() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"base", "preset", *BLOCKS}
