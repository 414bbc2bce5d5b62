"""A base with tokens of the user's own: its embedding and head have a row for each.

A row lies at its token's id. Where the tables have rows beyond the tokenizer's ids (a padded vocabulary)
those are used, else the tables grow by as many as are missing, and by none that nothing names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.mapped import Bytes
from lorimer.bases.open import BaseFiles
from lorimer.data.added import AddedTokens, add_tokens
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import BaseError, ConfigError, UserError
from lorimer.model.families import read_spec, why_not_native
from lorimer.quant.gguf_blocks import stored
from lorimer.quant.gguf_encode import encode

STRETCH = 1 << 21  # numbers of a table that are float64 at once


class GrownBase(BaseFiles):
    """The files of a base as if its tables had rows for these tokens. Its fingerprint is the base's own: an
    adapter belongs to that, and brings its tokens.

    A new row begins as the mean of the rows that the base was trained with. Its logit is then never above
    the largest of the others', so the base's own answers hardly change; a random row, or the zeros of a
    padded vocabulary, may be read as any token, or be likelier than every word. The mean is the same
    wherever it is computed.
    """

    def __init__(
        self, base: BaseFiles, tokenizer: Tokenizer, added: AddedTokens, ids: tuple[int, ...]
    ) -> None:
        self.inner, self.added, self.added_ids = base, added, ids
        self.path, self.kind = base.path, base.kind
        self.gguf_metadata, self.chat_template = base.gguf_metadata, base.chat_template
        self.generation_config = base.generation_config
        self.tokenizer_json, self.tokenizer_config = tokenizer.to_json(), tokenizer.config
        spec = read_spec(base.config, path=str(base.path))
        self.rows = max(spec.vocab_size, ids[-1] + 1)
        self.config = base.config | {"vocab_size": self.rows}
        names = [f"{spec.names.embedding}.weight", f"{spec.names.head}.weight"]
        self.tables = [name for name in names if name in base.tensors]
        self.tensors = base.tensors | {name: self._entry(name) for name in self.tables}

    @property
    def grows(self) -> bool:
        """Whether the base has fewer rows than its tokens now need."""
        return self.rows > int(self.inner.config["vocab_size"])

    def _entry(self, name: str) -> TensorEntry:
        entry = self.inner.tensors[name]
        if len(entry.shape) != 2 or name.removesuffix("weight") + "SCB" in self.inner.tensors:
            raise BaseError(
                f"`{name}` is quantised in this base, and cannot take the rows of new tokens",
                path=self.path,
            )
        nbytes = entry.nbytes // entry.shape[0] * self.rows
        return entry._replace(shape=(self.rows, entry.shape[1]), nbytes=nbytes)

    def raw(self, name: str) -> Bytes:
        if name not in self.tables:
            return self.inner.raw(name)
        entry, rows = (
            self.tensors[name],
            self.inner.raw(name).reshape(self.inner.tensors[name].shape[0], -1),
        )
        grown = np.empty((entry.shape[0], rows.shape[1]), np.uint8)
        grown[: len(rows)] = rows
        grown[len(rows) :] = grown[list(self.added_ids)] = self._begin[name]
        flat: Bytes = grown.reshape(-1)
        return flat

    @cached_property
    def _begin(self) -> dict[str, Bytes]:
        """The bytes of a new row of each table."""
        found = {}
        for name in self.tables:
            total_H, count = torch.zeros(self.tensors[name].shape[1], dtype=torch.float64), 0
            for part in self._stretches(name):
                total_H, count = total_H + part.double().sum(0), count + len(part)
            row = (total_H / count).float().unsqueeze(0)
            try:
                found[name] = encode(row, self.tensors[name].dtype)
            except UserError as error:
                raise BaseError(f"`{name}`: {error.problem}", fix=error.fix, path=self.path) from error
        return found

    def _stretches(self, name: str) -> Iterator[Tensor]:
        """The rows that the base was trained with: those of the ids before the new ones."""
        entry = self.inner.tensors[name]
        raw = self.inner.raw(name).reshape(entry.shape[0], -1)[: self.added_ids[0]]
        step = max(1, STRETCH // entry.shape[1])
        for first in range(0, len(raw), step):
            here = raw[first : first + step]
            yield stored(here.reshape(-1), entry.dtype, (len(here), entry.shape[1]))

    def release(self) -> None:
        self.inner.release()

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def with_tokens(base: BaseFiles, added: AddedTokens) -> BaseFiles:
    """The base with these tokens; itself if there are none. Raises ConfigError or BaseError."""
    if not added:
        return base
    if why := why_not_native(base.config):
        raise ConfigError(
            f"tokens can be added to bases of lorimer's own decoder alone: {why} "
            f"(`{base.config.get('model_type')}`)",
            fix="Leave `data.add_tokens` and `data.add_special_tokens` out.",
            path=base.path,
        )
    tokenizer, ids = add_tokens(Tokenizer.from_base(base), added)
    return GrownBase(base, tokenizer, added, ids)


def added_to(base: BaseFiles) -> AddedTokens:
    """The tokens that a base was opened with, beside its own."""
    return base.added if isinstance(base, GrownBase) else AddedTokens()


def added_json(base: BaseFiles) -> dict[str, object]:
    """For an adapter's manifest: the tokens, their ids, and how many rows the tables have if they grew."""
    if not isinstance(base, GrownBase):
        return {}
    rows = base.rows if base.grows else None
    return base.added.as_json() | {"ids": list(base.added_ids), "rows": rows}


def added_ids(base: BaseFiles) -> tuple[int, ...]:
    return base.added_ids if isinstance(base, GrownBase) else ()
