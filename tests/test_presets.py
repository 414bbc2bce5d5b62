"""Presets: ordinary settings under the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorimer.config import config_from, dump_yaml, explain, json_schema, read_config
from lorimer.config.presets import PRESETS
from lorimer.errors import ConfigError

GIVEN = {"base": "b", "data": {"train": "train.jsonl"}}


@pytest.mark.parametrize("name", PRESETS)
def test_each_sets_what_it_says(name: str) -> None:
    config = config_from(GIVEN | {"preset": name}, need_files=False)
    for block, settings in PRESETS[name].items():
        for key, value in settings.items():
            assert getattr(getattr(config, block), key) == value, (block, key)
    text = explain(name)
    assert f"preset: {name}" in text
    assert all(key in text for settings in PRESETS[name].values() for key in settings)


def test_the_users_own_settings_win_and_later_presets_go_over_earlier(tmp_path: Path) -> None:
    given = GIVEN | {"preset": ["low-memory", "classification"], "lora": {"r": 5}, "quant": "int8"}
    config = config_from(given, need_files=False)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (5, 16.0, 0.05)
    assert (config.quant.kind, config.quant.embeddings) == ("int8", True)
    assert config.train.optimizer == "adamw_8bit"
    # What a run keeps says all of it, and reads back the same.
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert read_config(path, need_files=False) == config
    assert read_config(path, ["lora.r=7"], need_files=False).lora.r == 7


def test_an_unknown_preset_names_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("base: b\ndata: {train: t.jsonl}\npreset: fast\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'fast'.*low-memory, balanced") as caught:
        read_config(path, need_files=False)
    assert caught.value.line == 3


def test_the_schema_takes_one_or_a_list() -> None:
    listed, one = json_schema()["properties"]["preset"]["anyOf"]
    assert listed["type"] == "array"
    assert one["enum"] == list(PRESETS)
