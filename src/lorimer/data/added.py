"""Tokens that a run adds to its base's tokenizer.

Text tokens are words of the user's own: they are found wherever a text holds them, in training and in
answers alike. Special ones are control tokens, which only a chat template writes. Both get the ids after
the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from lorimer.config import DataConfig
from lorimer.data.tokenizer import TEXT_TOKENS, Tokenizer
from lorimer.errors import AdapterError, ConfigError

SETTINGS = {"text": "data.add_tokens", "special": "data.add_special_tokens"}


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """What is added, in the order of the ids."""

    text: tuple[str, ...] = ()
    special: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.special)

    @property
    def all(self) -> tuple[str, ...]:
        return self.text + self.special

    @classmethod
    def of_config(cls, config: DataConfig) -> AddedTokens:
        return cls(tuple(config.add_tokens), tuple(config.add_special_tokens))

    def as_json(self) -> dict[str, list[str]]:
        return {"text": list(self.text), "special": list(self.special)}

    @classmethod
    def of_json(cls, value: Any) -> AddedTokens:
        """From a manifest. Raises AdapterError."""
        found: list[Any] = [value.get(kind, []) if isinstance(value, dict) else None for kind in SETTINGS]
        if not all(isinstance(part, list) and all(isinstance(t, str) for t in part) for part in found):
            raise AdapterError("its manifest's `added_tokens` cannot be used", fix="Copy the folder again.")
        return cls(*(tuple(part) for part in found))


def last_id(tokenizer: Tokenizer) -> int:
    """The largest id that a tokenizer gives."""
    described = json.loads(tokenizer.to_json())
    vocabulary = described["model"]["vocab"]
    ids: list[int] = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(int(token["id"]) for token in described.get("added_tokens", []))])


def add_tokens(tokenizer: Tokenizer, added: AddedTokens) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer with these tokens, and their ids. Raises ConfigError for one that cannot be added."""
    for setting, text, fix in _faults(tokenizer, added):
        raise ConfigError(f"`{setting}` {text}", fix=fix)
    first = last_id(tokenizer) + 1
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added.text])
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in added.special]
    )
    config = dict(tokenizer.config) | {TEXT_TOKENS: [*tokenizer.text_tokens, *added.text]}
    made = Tokenizer(str(backend.to_str()), config)
    made.more_eos_ids = tokenizer.more_eos_ids
    ids = tuple(range(first, first + len(added.all)))
    if any(made.encode(token) != [number] for token, number in zip(added.all, ids, strict=True)):
        raise ConfigError(
            "this base's tokenizer cannot take new tokens: its ids have gaps, or it changes texts before "
            "it looks for tokens",
            fix="Use markers that are ordinary text.",
        )
    return made, ids


def _faults(tokenizer: Tokenizer, added: AddedTokens) -> Iterator[tuple[str, str, str]]:
    """The setting, what is wrong with it, and what to do."""
    named = [(SETTINGS[kind], token) for kind in SETTINGS for token in getattr(added, kind)]
    known = [token for token in tokenizer.added if token.strip()]
    for position, (setting, token) in enumerate(named):
        if not token or token != token.strip():
            yield setting, f"holds {token!r}", "A token is a text without white space at its ends."
        if not _is_text(token):
            yield setting, f"holds {token!r}, which is no text", "Write it in Unicode characters."
        if token in [other for _, other in named[:position]]:
            yield setting, f"holds `{token}`, which is named twice", "Name it once."
        number = tokenizer.id(token)
        if number is not None:
            yield (
                setting,
                f"holds `{token}`, which the base has already (id {number})",
                "Leave it out; `lora.modules_to_save: [embed_tokens]` trains the embedding of every token.",
            )
        for other in (*known, *(other for _, other in named)):
            if other != token and (token in other or other in token):
                short, long = sorted((token, other), key=len)
                yield setting, f"holds `{token}`: `{short}` is part of `{long}`", "Choose another spelling."


def _is_text(token: str) -> bool:
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def brought_by(
    folder_tokenizer: str | None, manifest: Mapping[str, Any], tokenizer: Tokenizer
) -> AddedTokens:
    """The tokens that an adapter adds to its base's tokenizer: its manifest says so, or else the tokenizer
    in its folder has them."""
    if manifest.get("added_tokens") is not None:
        return AddedTokens.of_json(manifest["added_tokens"])
    if folder_tokenizer is None:
        return AddedTokens()
    try:
        listed = json.loads(folder_tokenizer).get("added_tokens", [])
        found = [(t["id"], t["content"], t["special"]) for t in listed]
    except (ValueError, KeyError, TypeError, AttributeError):
        return AddedTokens()
    fresh = sorted(one for one in found if tokenizer.id(one[1]) is None)
    names, special = [content for _, content, _ in fresh], [bool(kind) for *_, kind in fresh]
    if special != sorted(special):
        return AddedTokens(tuple(names))  # mixed: their ids must stay in this order
    return AddedTokens(tuple(names[: special.count(False)]), tuple(names[special.count(False) :]))
