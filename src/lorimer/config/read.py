"""A YAML file and `key=value` overrides, or a dict -> RunConfig; RunConfig -> YAML."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorimer.config.presets import PRESETS, with_presets
from lorimer.config.problems import found_text, wrong_names, wrong_values
from lorimer.config.settings import BLOCKS, SHORT, RunConfig
from lorimer.config.yaml_text import Lines, Place, read_yaml, scalar, write_yaml
from lorimer.errors import ConfigError

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
            f"this is {found_text(value)} (wanted: settings)",
            fix="It is YAML: begin with `base: smollm2-135m`.",
            path=path,
        )
    source = _Source(str(path), lines)
    value = _spelled_out(value)
    for text in overrides:
        _put_override(value, text, source)
    config = _build(value, source)
    return _with_paths(config, source, path.absolute().parent, need_files)


def config_from(value: Mapping[str, Any], *, need_files: bool = True) -> RunConfig:
    """The settings in a dict of the same shape; paths are relative to the current folder."""
    source = _Source(None, {})
    return _with_paths(_build(_spelled_out(_plain(value)), source), source, Path.cwd(), need_files)


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
        fix = "Give the path of a YAML file that you may read."
        raise ConfigError(f"cannot be read: {error.strerror}", fix=fix, path=path) from error


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
    if len(place) == 1 and place[0] in SHORT and isinstance(found, str):
        place = (place[0], SHORT[place[0]])
    block = value
    for i, part in enumerate(place[:-1]):
        if block.get(part) is None:
            block[part] = {}
        block = block[part]
        if not isinstance(block, dict):
            inner = ".".join(place[: i + 1])
            fix = "`lorimer config explain` lists the settings."
            raise ConfigError(f"`{text}`: there are no settings inside `{inner}`", fix=fix)
    block[place[-1]] = found


def _spelled_out(value: dict[str, Any]) -> dict[str, Any]:
    """A block that was written as one word, as a block."""
    return {
        key: {SHORT[key]: inner} if key in SHORT and isinstance(inner, str) else inner
        for key, inner in value.items()
    }


def _plain(value: Any) -> Any:
    """Paths as text, tuples as lists: what a YAML file could hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _build(value: dict[str, Any], source: _Source) -> RunConfig:
    value = {k: {} if v is None and k in BLOCKS else v for k, v in value.items()}
    if isinstance(value.get("preset"), str):
        value["preset"] = [value["preset"]]
    if isinstance(names := value.get("preset"), list) and all(name in PRESETS for name in names):
        value = with_presets(value, names)
    problems = list(wrong_names(value))
    if not problems:
        try:
            return RunConfig.model_validate(value, strict=True)
        except ValidationError as error:
            problems = list(wrong_values(error))
    first, *others = sorted(problems, key=lambda problem: source.line(problem.place) or 0)
    notes = [first.fix] if first.fix else []
    for problem in others[:5]:
        other = source.error(problem.place, problem.text)
        where = f", line {other.line}" if other.line else ""
        notes.append(f"also{where}: {other.problem}{f'. {problem.fix}' if problem.fix else ''}")
    raise source.error(first.place, first.text, "\n  ".join(notes) or None)


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
            if not given:
                fix = f"Name at least one, as `{name}: [train.jsonl]`."
                raise source.error(place, f"`{key}` is a list of no files", fix)
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
        fix = f"Did you mean `{close[0]}`? " if close else "Check the path. "
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
