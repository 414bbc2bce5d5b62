"""What is said about a wrong name or a wrong value in the settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lorimer.config.other_names import OTHER_NAMES
from lorimer.config.settings import BLOCKS, SETTINGS, RunConfig
from lorimer.config.yaml_text import Place, scalar


@dataclass(frozen=True, slots=True)
class Problem:
    place: Place
    text: str
    fix: str | None = None


def wrong_names(value: Mapping[Any, Any]) -> Iterator[Problem]:
    for key, inner in value.items():
        if key not in RunConfig.model_fields:
            yield unknown((str(key),))
        elif key in BLOCKS and isinstance(inner, Mapping):
            known = BLOCKS[key].model_fields
            yield from (unknown((key, str(name))) for name in inner if name not in known)


def unknown(place: Place) -> Problem:
    """What a name that is not ours was meant to be."""
    name = str(place[-1])
    plain = name.strip().lower().replace("-", "_")
    return Problem(place, f"there is no setting `{'.'.join(map(str, place))}`", _meant(plain, place))


def _meant(name: str, place: Place) -> str:
    if name in SETTINGS:
        return f"A dot does not nest in YAML. Write {_how(name)}."
    ours = [key for key in SETTINGS if key.rpartition(".")[2] == name and key != ".".join(map(str, place))]
    if ours:
        return f"Write it as {' or '.join(f'`{key}`' for key in ours)}: {_how(ours[0])}."
    if name in BLOCKS and len(place) > 1:
        return f"`{name}` is a block of its own: write it at the top of the file."
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


def wrong_values(error: ValidationError) -> Iterator[Problem]:
    """One problem for each setting; a union's members each complain of the same one."""
    found: dict[Place, ErrorDetails] = {}
    for item in error.errors(include_url=False):
        place = item["loc"][: 2 if item["loc"][0] in BLOCKS else 1]
        # The complaint about an item of a list says more than that about the list.
        if place not in found or isinstance(item["loc"][-1], int):
            found[place] = item
    yield from (_wrong_value(place, item) for place, item in found.items())


def _wrong_value(place: Place, item: ErrorDetails) -> Problem:
    value = item["input"]
    key = ".".join(map(str, place))
    if item["type"] == "missing":
        example = SETTINGS[key].examples[0] if key in SETTINGS else "{train: train.jsonl}"
        return Problem(place, f"`{key}` is not given", f"Add for example: {key.split('.')[-1]}: {example}")
    if item["type"] == "value_error":
        return Problem(place, item["msg"].removeprefix("Value error, "), _more(key))
    if key not in SETTINGS:
        text = f"`{key}` is {found_text(value)} (wanted: a block of settings)"
        return Problem(place, text, f"Write its settings under it, as `{key}: {{NAME: VALUE}}`.")
    said = (
        f"has {found_text(value)} in its list"
        if isinstance(item["loc"][-1], int)
        else f"is {found_text(value)}"
    )
    text = f"`{key}` {said} (wanted: {SETTINGS[key].wanted})"
    fix = None if "a time" in SETTINGS[key].wanted else _value_fix(value, item["type"])
    return Problem(place, text, fix or _more(key))


def _more(key: str) -> str:
    return f"`lorimer config explain {key}` says more." if key else "`lorimer config explain` says more."


def _value_fix(value: Any, kind: str) -> str | None:
    if kind == "string_type" and isinstance(value, int | float):
        return f'Put it in quotes: "{value}".'
    if kind == "bool_type" and str(value).lower() in ("yes", "no", "on", "off"):
        return "Write true or false."
    if isinstance(value, str) and kind != "string_type" and not isinstance(scalar(value), str):
        return "Take the quotes away."
    return None


def found_text(value: Any) -> str:
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
