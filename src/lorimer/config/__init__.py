"""The settings of a run.

settings.py     every setting with its type, default, bounds and help: RunConfig
read.py         a YAML file and overrides, or a dict -> RunConfig, and back
presets.py      a word for a set of settings
problems.py     what is said about wrong names and values
other_names.py  names from other tools, answered with ours
yaml_text.py    YAML -> values that know their line
explain.py      settings as text and as a JSON Schema
"""

from lorimer.config.explain import explain, json_schema
from lorimer.config.read import config_from, dump_yaml, read_config
from lorimer.config.settings import (
    BLOCKS,
    SETTINGS,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    OutputConfig,
    QuantConfig,
    RunConfig,
    Setting,
    TrainConfig,
)

__all__ = [
    "BLOCKS",
    "SETTINGS",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "OutputConfig",
    "QuantConfig",
    "RunConfig",
    "Setting",
    "TrainConfig",
    "config_from",
    "dump_yaml",
    "explain",
    "json_schema",
    "read_config",
]
