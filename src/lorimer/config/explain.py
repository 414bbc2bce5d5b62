"""Settings as text for `lorimer config explain`, and as a JSON Schema."""

from __future__ import annotations

import shlex
import textwrap
from typing import Any

from lorimer.config.other_names import OTHER_NAMES
from lorimer.config.presets import PRESETS
from lorimer.config.problems import unknown
from lorimer.config.settings import BLOCKS, SETTINGS, SHORT, RunConfig
from lorimer.config.yaml_text import write_yaml
from lorimer.errors import ConfigError


def explain(key: str) -> str:
    """A setting, or all settings of a block, as text. Raises ConfigError with the nearest name."""
    if key in BLOCKS:
        return "\n\n".join(explain(name) for name in SETTINGS if name.startswith(f"{key}."))
    if key in PRESETS:
        return _explain_preset(key)
    if key not in SETTINGS:
        return _explain_other(key)
    setting = SETTINGS[key]
    default = "required" if setting.required else f"default: {_shown(setting.default)}"
    example = f"{key}={_shown(setting.examples[0])}"
    lines = [
        key,
        *textwrap.wrap(setting.description, 70, initial_indent="  ", subsequent_indent="  "),
        *textwrap.wrap(f"value: {setting.wanted}", 90, initial_indent="  ", subsequent_indent="    "),
        f"  {default}",
        f"  example: lorimer train config.yaml {shlex.quote(example) if ' ' in example else example}",
    ]
    return "\n".join(lines)


def _explain_preset(name: str) -> str:
    """What a preset sets, as it would stand in a file."""
    head = f"{name}\n  a preset: `preset: {name}` stands for these settings, under the others"
    return f"{head}\n\n{textwrap.indent(write_yaml(PRESETS[name]), '  ').rstrip()}"


def _explain_other(key: str) -> str:
    """The settings whose last part is `key`, or the answer to another tool's name."""
    if ours := [name for name in SETTINGS if name.rpartition(".")[2] == key]:
        return "\n\n".join(explain(name) for name in ours)
    problem = unknown(tuple(key.split(".")))
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
    schema = RunConfig.model_json_schema()
    for block, name in SHORT.items():
        word = BLOCKS[block].model_json_schema()["properties"][name]
        schema["properties"][block] = {"anyOf": [schema["properties"][block], {"enum": word["enum"]}]}
    listed = schema["properties"]["preset"]
    schema["properties"]["preset"] = {"anyOf": [listed, {"enum": list(PRESETS)}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
