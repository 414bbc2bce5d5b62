"""YAML text -> plain values and the line of each; plain values -> YAML text.

Scalars follow the core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2): `2e-4` is a number, and
`no`, `on`, dates and `1:30` are text. Nothing is ever constructed but dict, list, str, int, float,
bool and None.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lorimer.errors import ConfigError

Place = tuple[str | int, ...]  # keys and list indices from the top
Lines = dict[Place, int]

# More nodes than any config has; stops aliases that unfold without end.
MOST_NODES = 10_000
STANDARD_TAG = re.compile(r"tag:yaml\.org,2002:(str|int|float|bool|null|timestamp|map|seq|value)")
INTEGER = re.compile(r"[-+]?[0-9](_?[0-9])*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
CONSTANTS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip


def scalar(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    # Thousands of digits are no setting, and Python refuses to convert them.
    if len(text) <= 100 and INTEGER.fullmatch(text):
        return int(text)
    if len(text) <= 100 and FLOAT.fullmatch(text):
        return float(text)
    return text


def read_yaml(text: str, path: str | None = None) -> tuple[Any, Lines]:
    """The value of one YAML document, and the line on which each key and item stands.

    Raises ConfigError with path and line for bad syntax, a key given twice, a tag, or a second
    document.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        at = getattr(error, "position", None)  # of a character that YAML does not have
        line = text.count("\n", 0, at) + 1 if mark is None and isinstance(at, int) else None
        raise ConfigError(
            f"this is not YAML: {problem}",
            fix="Look at the indentation, the colons and the quotes there; YAML has no tabs.",
            path=path,
            line=line if mark is None else mark.line + 1,
        ) from error
    except RecursionError as error:
        fix = "Write them in blocks, as `lorimer config explain` shows them."
        raise ConfigError("the settings are nested too deep", fix=fix, path=path) from error
    reader = _Reader(path)
    return (None if node is None else reader.value(node, ())), reader.lines


class _Reader:
    def __init__(self, path: str | None) -> None:
        self.path = path
        self.lines: Lines = {}
        self.nodes = 0

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.nodes += 1
        self.lines.setdefault(place, node.start_mark.line + 1)
        if self.nodes > MOST_NODES or len(place) > 50:
            fix = "Write values out in place of aliases (&name, *name)."
            raise self.refuse(node, "there are more settings here than any run has", fix)
        if not STANDARD_TAG.fullmatch(node.tag):
            raise self.refuse(node, f"the tag `{node.tag}` is not read", "Write a plain value.")
        if isinstance(node, yaml.ScalarNode):
            return scalar(node.value) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*place, i)) for i, item in enumerate(node.value)]
        return self.mapping(node, place)

    def mapping(self, node: yaml.Node, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                fix = "Write a name and a colon, as `lora:`."
                raise self.refuse(key_node, "a name of a setting must be text", fix)
            if key in found:
                first = self.lines[(*place, key)]
                raise self.refuse(key_node, f"`{key}` is given twice, first on line {first}", "Keep one.")
            self.lines[(*place, key)] = key_node.start_mark.line + 1
            found[key] = self.value(value_node, (*place, key))
        return found

    def refuse(self, node: yaml.Node, problem: str, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, fix=fix, path=self.path, line=node.start_mark.line + 1)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `scalar` would not read back as it is."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if scalar(text) != text or not text.isprintable() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back equal."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
