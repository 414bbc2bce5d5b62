"""Which linear layers get an adapter: `target_modules` and `layers` against what the model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorimer.errors import ConfigError
from lorimer.lora.stacked import is_expert, parameter_of
from lorimer.model.decoder import Decoder
from lorimer.model.parts import Projections, Table

# Settings that mean many modules.
WORDS = ("all-linear", "attention", "mlp")


@dataclass(frozen=True, slots=True)
class Target:
    """One linear layer of a stacked group: `group.names[position]`."""

    group: Projections
    position: int

    @property
    def path(self) -> str:
        return f"{self.group.path}.{self.group.names[self.position]}"

    @property
    def name(self) -> str:
        return self.group.names[self.position]

    @property
    def layer(self) -> int:
        return self.group.layer

    @property
    def outputs(self) -> int:
        return self.group.rows[self.position]


def all_targets(decoder: Decoder) -> list[Target]:
    """Every linear layer that can carry an adapter, in the order of computation."""
    return [Target(group, i) for group in decoder.projections() for i in range(len(group.names))]


def select_targets(
    decoder: Decoder, target_modules: str | Sequence[str], layers: str | Sequence[int] | None = None
) -> list[Target]:
    """The linear layers meant by the settings `lora.target_modules` and `lora.layers`.

    Raises ConfigError naming what exists if something matches nothing.
    """
    targets = all_targets(decoder)
    chosen = _by_module(targets, target_modules, [table.path for table in _tables(decoder)])
    _check_experts(targets, chosen)
    if layers is not None:
        wanted = _layer_numbers(layers, decoder.spec.layers)
        chosen = [target for target in chosen if target.layer in wanted]
        if not chosen and not select_tables(decoder, target_modules):
            raise ConfigError(
                f"`lora.layers: {layers}` leaves none of the modules that `lora.target_modules` chose",
                fix="Widen one of the two.",
            )
    return chosen


def _tables(decoder: Decoder) -> tuple[Table, Table]:
    return decoder.embedding, decoder.head


def select_tables(decoder: Decoder, target_modules: str | Sequence[str]) -> list[Table]:
    """Of embedding and head those that `lora.target_modules` means: by name, by path or by a pattern, and
    by no word for many, as in PEFT."""
    if isinstance(target_modules, str):
        if target_modules in WORDS:
            return []
        named = [table for table in _tables(decoder) if _ends(table.path, target_modules)]
        return named or [table for table in _tables(decoder) if _matches(target_modules, table.path)]
    return [table for table in _tables(decoder) if any(_ends(table.path, name) for name in target_modules)]


def _matches(pattern: str, path: str) -> bool:
    return _compiled(pattern).fullmatch(path) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"`lora.target_modules: {pattern}` is not a valid pattern: {error}",
            fix="Mend the pattern, or give a list of names: `lorimer config explain lora.target_modules`.",
        ) from error


def _check_experts(targets: list[Target], chosen: list[Target]) -> None:
    """PEFT keeps the adapters of a layer's experts in one tensor: all of them, or none."""
    paths = {target.path for target in chosen}
    whole = {parameter_of(path) for path in paths if is_expert(path)}
    for target in targets:
        if is_expert(target.path) and parameter_of(target.path) in whole and target.path not in paths:
            raise ConfigError(
                f"`lora.target_modules` leaves out `{target.path}`, but not all experts of its layer",
                fix="An adapter is on all experts of a layer, or on none.",
            )


def _by_module(targets: list[Target], wanted: str | Sequence[str], tables: Sequence[str]) -> list[Target]:
    """`tables` are the paths of embedding and head, which may be wanted too."""
    names = sorted({target.name for target in targets} | {path.rpartition(".")[2] for path in tables})
    if wanted in WORDS:
        used = [target for target in targets if target.group.learns]
        if wanted == "all-linear":
            return used
        return [target for target in used if target.group.attention == (wanted == "attention")]
    if isinstance(wanted, str):
        if wanted not in names:
            return _by_pattern(targets, wanted, tables)
        wanted = (wanted,)
    if not wanted:
        raise ConfigError(
            "`lora.target_modules` names no module", fix=f"The model has: {', '.join(names)}."
        )
    for name in wanted:
        if not any(_ends(path, name) for path in (*tables, *(target.path for target in targets))):
            close = difflib.get_close_matches(name, names, 1)
            raise ConfigError(
                f"`lora.target_modules` names `{name}`, which this model does not have",
                fix=(f"Did you mean `{close[0]}`? " if close else "") + f"It has: {', '.join(names)}.",
            )
    return [target for target in targets if any(_ends(target.path, name) for name in wanted)]


def _ends(path: str, name: str) -> bool:
    """Whether this is a module's last name or the end of its path, as PEFT matches lists."""
    return path == name or path.endswith("." + name)


def _by_pattern(targets: list[Target], pattern: str, tables: Sequence[str]) -> list[Target]:
    chosen = [target for target in targets if _matches(pattern, target.path)]
    if not chosen and not any(_matches(pattern, path) for path in tables):
        raise ConfigError(
            f"`lora.target_modules: {pattern}` matches no linear layer",
            fix=f"A pattern must match a whole path such as `{targets[0].path}`; "
            "or use all-linear, attention, mlp, or a list of names.",
        )
    return chosen


def _layer_numbers(layers: str | Sequence[int], count: int) -> set[int]:
    """`[0, 5]`, `8-15` (both ends included) or `last:4`."""
    if not isinstance(layers, str):
        numbers = set(layers)
    elif match := re.fullmatch(r"last:(\d+)", layers.strip()):
        numbers = set(range(count - int(match.group(1)), count))
    elif match := re.fullmatch(r"(\d+)-(\d+)", layers.strip()):
        numbers = set(range(int(match.group(1)), int(match.group(2)) + 1))
    else:
        raise ConfigError(
            f"`lora.layers: {layers}` is not understood", fix="Give a list, `8-15`, or `last:4`."
        )
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise ConfigError(
            f"`lora.layers: {layers}` goes outside the model", fix=f"It has layers 0 to {count - 1}."
        )
    return numbers


def describe_targets(targets: Sequence[Target], layers: int, more: Sequence[str] = ()) -> str:
    """`q_proj, v_proj in 30 layers` or, where layers differ, each name with its count; then `more`."""
    return "; ".join(filter(None, [_described(targets, layers), ", ".join(more)]))


def _described(targets: Sequence[Target], layers: int) -> str:
    counts: dict[str, int] = {}
    for target in targets:
        counts[target.name] = counts.get(target.name, 0) + 1
    if len(set(counts.values())) == 1:
        number = next(iter(counts.values()))
        where = f"all {layers} layers" if number == layers else f"{number} of {layers} layers"
        return f"{', '.join(counts)} in {where}"
    return ", ".join(f"{name} x{count}" for name, count in counts.items())
