"""A base with tokens of the user's own: its embedding and head have a row for each.

A row lies at its token's id. Where the tables have rows beyond the tokenizer's ids (a padded vocabulary)
those are used, else the tables grow by as many as are missing, and by none that nothing names.
"""

from __future__ import annotations

import math
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
from lorimer.errors import BaseError, UserError
from lorimer.model.families import read_spec, why_not_native
from lorimer.model.spec import ModelSpec
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
        spec = _spec(base)
        self._own_rows = spec.vocab_size
        self.rows = max(spec.vocab_size, ids[-1] + 1)
        self.config = base.config | {"vocab_size": self.rows}
        self.tables = list(_tables(base, spec))
        self.tensors = base.tensors | {name: self._entry(name) for name in self.tables}

    @property
    def grows(self) -> bool:
        """Whether the base has fewer rows than its tokens now need."""
        return self.rows > self._own_rows

    def _entry(self, name: str) -> TensorEntry:
        entry = self.inner.tensors[name]
        sizes = 1 if name.endswith(".bias") else 2
        if len(entry.shape) != sizes or name.removesuffix("weight") + "SCB" in self.inner.tensors:
            raise BaseError(
                f"`{name}` is quantised in this base, and cannot take the rows of new tokens",
                path=self.path,
            )
        nbytes = entry.nbytes // entry.shape[0] * self.rows
        return entry._replace(shape=(self.rows, *entry.shape[1:]), nbytes=nbytes)

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
            total_H, count = torch.zeros(self._width(name), dtype=torch.float64), 0
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
        step = max(1, STRETCH // self._width(name))
        for first in range(0, len(raw), step):
            here = raw[first : first + step]
            yield stored(here.reshape(-1), entry.dtype, (len(here), self._width(name)))

    def _width(self, name: str) -> int:
        """Numbers for a token: 1 of a head's bias."""
        return math.prod(self.inner.tensors[name].shape[1:])

    def release(self) -> None:
        self.inner.release()

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def _spec(base: BaseFiles) -> ModelSpec:
    """The names and sizes of the base's tables, whoever computes it."""
    if base.kind != "gguf" and (why := why_not_native(base.config)):
        from lorimer.model.foreign import shape_of

        return shape_of(base, why, torch.float32).spec
    return read_spec(base.config, path=str(base.path))


def _tables(base: BaseFiles, spec: ModelSpec) -> Iterator[str]:
    """The base's tensors that have a row for each token. Files of transformers may leave out the name of
    the model's outermost part."""
    head = spec.names.head
    for name in (f"{spec.names.embedding}.weight", f"{head}.weight", f"{head}.bias"):
        yield from (known for known in (name, name.partition(".")[2]) if known in base.tensors)


def with_tokens(base: BaseFiles, added: AddedTokens) -> BaseFiles:
    """The base with these tokens; itself if there are none. Raises ConfigError or BaseError."""
    if not added:
        return base
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
