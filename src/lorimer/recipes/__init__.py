"""Recipes: a config and its data, ready to train, inside the package.

Each is a folder: NAME.yaml, train.jsonl, valid.jsonl, test.jsonl, MANIFEST.json (where the rows come
from) and their licence.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from lorimer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Recipe:
    """The folder of a recipe and its config file."""

    name: str
    folder: Path
    config: Path


def recipe(name: str) -> Recipe:
    """A recipe by name. Raises ConfigError with the names that there are."""
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        fix = f"Did you mean `{close[0]}`? " if close else ""
        raise ConfigError(f"there is no recipe `{name}`", fix=f"{fix}There are: {', '.join(names)}.")
    folder = _here() / name
    return Recipe(name, folder, folder / f"{name}.yaml")


def recipe_names() -> list[str]:
    return sorted(path.parent.name for path in _here().glob("*/*.yaml"))


def _here() -> Path:
    return Path(__file__).parent
