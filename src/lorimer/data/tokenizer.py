"""Text <-> ids, with control tokens that only the program can write.

Two backends are built from one tokenizer.json. `plain` is the true tokenizer. `guarded` is the same
with every added token renamed to a private string that changes with each process. The chat
template's own markers are swapped for the private names just before encoding; a marker spelled in
a message is not, so it is tokenised as the ordinary text it is. Everything else about tokenisation
(merges, stripping around markers, normalisers) stays the reference's, in one pass.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import tokenizers

from lorimer.bases.open import BaseFiles
from lorimer.data.vocabulary import adds_bos, adds_eos, role_id, tokenizer_json
from lorimer.errors import BaseError

Json = dict[str, Any]
LIBRARY_CLASS = "PreTrainedTokenizerFast"
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")
# In tokenizer_config.json and in a GGUF file's metadata: added tokens that a message may hold. Other tools
# pass the key over.
TEXT_TOKENS, GGUF_TEXT_TOKENS = "lorimer_text_tokens", "lorimer.text_tokens"


SAVE = "Save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)."


@dataclass(frozen=True, slots=True)
class Piece:
    """Rendered text to encode: its first `trained` characters are what the model learns to write."""

    text: str
    trained: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """What markers begin and end with; parts that may be words of their own are not among them."""

    heads: frozenset[str]
    tails: frozenset[str]
    longest: int

    @classmethod
    def of(cls, markers: Iterable[str]) -> _Parts:
        heads = {m[:n] for m in markers if not m[0].isalnum() for n in range(1, len(m))}
        tails = {m[n:] for m in markers if not m[-1].isalnum() for n in range(1, len(m))}
        return cls(frozenset(heads), frozenset(tails), max(map(len, heads | tails), default=0))


class Tokenizer:
    """Made by `from_base`, `from_json` or `from_gguf`. Ids are those of the tokenizers library."""

    def __init__(self, text: str, config: Mapping[str, Any]) -> None:
        described = _described(text)
        if described["model"].pop("dropout", None) is not None:  # BPE's cuts a text otherwise each time
            text = json.dumps(described)
        try:
            self._plain = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise BaseError(f"the tokenizer cannot be read: {error}", fix=SAVE) from error
        # Truncation and padding of a saved tokenizer would cut rows in silence.
        self._plain.no_truncation()
        self._plain.no_padding()
        self.config = dict(config)
        self.more_eos_ids: tuple[int, ...] = ()  # those that the base's settings name
        falls_back = bool(described["model"].get("byte_fallback"))
        self._added = {
            t["content"]: t
            for t in described.get("added_tokens", [])
            # Runs of spaces are text, however they are written. Bytes that are listed as added tokens must
            # keep the names that byte fallback looks up.
            if t["content"].strip().strip("▁") and not (falls_back and BYTE_NAME.fullmatch(t["content"]))
        }
        self.byte_ids = _byte_ids(described) if falls_back else frozenset()
        self._nonce = secrets.token_hex(8)
        # Who adds a token by `data.add_tokens` means it wherever a text holds it: these are no markers.
        free = self.config.get(TEXT_TOKENS)
        self.text_tokens = [t for t in self._added if isinstance(free, list) and t in free]
        markers = [token for token in self._added if token not in self.text_tokens]
        self._private = {token: f"\ue000{self._nonce}{n:x}\ue001" for n, token in enumerate(markers)}
        self._alias = {token: f"\ue002{self._nonce}{n:x}\ue003" for n, token in enumerate(markers)}
        self._spelled = {alias: token for token, alias in self._alias.items()}
        self._numbers = count(len(self._alias))
        special = [token for token in markers if self._added[token]["special"]]
        self._marker, self._special = _any_of(markers), _any_of(special)
        self._words = _any_of([token for token in markers if token not in special])
        self._parts, self._special_parts = _Parts.of(markers), _Parts.of(special)
        self._aliased = re.compile(f"\ue002{self._nonce}[0-9a-f]+\ue003")
        found = [f"\ue000{self._nonce}[0-9a-f]+\ue001", *map(re.escape, self.text_tokens)]
        self._named = re.compile("|".join(found))
        self._prefix = _prefix_scheme(described)
        self._guarded = tokenizers.Tokenizer.from_str(json.dumps(self._renamed(described)))
        self._rest = self._guarded
        if self._prefix != "none":
            self._rest = tokenizers.Tokenizer.from_str(
                json.dumps(_without_prefix(self._renamed(described)))
            )
        self._true_id = self._translation()
        self._added_ids = {
            number for t in self._added if (number := self._plain.token_to_id(t)) is not None
        }

    def _translation(self) -> dict[int, int]:
        """Ids that the guarded backend gave its renamed tokens -> the true ones, where they differ."""
        table = {}
        for token in self._added:
            private = self._private.get(token, token)
            own, true = self._guarded.token_to_id(private), self._plain.token_to_id(token)
            if own is not None and true is not None and own != true:
                table[own] = true
        return table

    @classmethod
    def from_base(cls, base: BaseFiles) -> Tokenizer:
        """The tokenizer of a base. Raises BaseError if it has none."""
        made = None
        try:
            if base.tokenizer_json is not None:
                made = cls(base.tokenizer_json, base.tokenizer_config)
            elif base.gguf_metadata is not None:
                made = cls.from_gguf(base.gguf_metadata)
        except BaseError as error:
            file = base.path if base.kind == "gguf" else base.path / "tokenizer.json"
            fix = "Download the file again." if base.kind == "gguf" and error.fix == SAVE else error.fix
            raise BaseError(error.problem, fix=fix, path=file) from error
        if made is not None:
            made.more_eos_ids = tuple(base.eos_token_ids())
            return made
        raise BaseError(
            "tokenizer.json is missing",
            fix=SAVE,
            path=base.path,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The vocabulary in a GGUF file's metadata."""
        text, tokens = tokenizer_json(metadata), metadata["tokenizer.ggml.tokens"]

        def token(role: str) -> str | None:
            number = role_id(metadata, role)
            return None if number is None else tokens[number]

        config = {
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "unk_token": token("unknown"),
            "pad_token": token("padding"),
            "add_bos_token": adds_bos(metadata),
            "add_eos_token": adds_eos(metadata),
            TEXT_TOKENS: metadata.get(GGUF_TEXT_TOKENS),
        }
        return cls(text, config)

    @property
    def vocab_size(self) -> int:
        return self._plain.get_vocab_size()

    def token_text(self, role: str) -> str | None:
        """The text of the bos, eos, pad or unk token, if there is one."""
        value = self.config.get(f"{role}_token")
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _id_of(self, role: str) -> int | None:
        text = self.token_text(role)
        return None if text is None else self._plain.token_to_id(text)

    @property
    def bos_id(self) -> int | None:
        return self._id_of("bos")

    @property
    def eos_id(self) -> int | None:
        return self._id_of("eos")

    @property
    def pad_id(self) -> int | None:
        return self._id_of("pad")

    @property
    def eos_ids(self) -> list[int]:
        return sorted({*([] if self.eos_id is None else [self.eos_id]), *self.more_eos_ids})

    @property
    def adds_bos(self) -> bool:
        """Whether plain text gets a bos token in front."""
        if self.bos_id is None:
            return False
        said = self.config.get("add_bos_token")
        return self._plain.encode("a").ids[:1] == [self.bos_id] if said is None else bool(said)

    def id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def token(self, number: int) -> str | None:
        return self._plain.id_to_token(number)

    @property
    def added(self) -> list[str]:
        """The added tokens: control tokens, and words that are never cut."""
        return list(self._added)

    def is_special(self, number: int) -> bool:
        """Whether this id is a control token: skipped when answers are decoded."""
        facts = self._added.get(self.token(number) or "")
        return facts is not None and bool(facts["special"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands; control tokens spelled in it become control tokens."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_content(self, text: str) -> list[int]:
        """Ids of a text in which nothing can become a control token."""
        return self._ids(self._guarded, text)

    def hide(self, text: str, *, own_words: bool = False) -> str:
        """Swap markers spelled in a message for aliases, so that a template's own stand out.

        Parts of a marker at the text's two ends are swapped too: what a template puts beside them could
        make them whole. `own_words`: in an assistant's message the added tokens that are not control
        tokens (`<think>`, `<tool_call>`) stay, because the model itself writes them.
        """
        pattern, parts = (self._special, self._special_parts) if own_words else (self._marker, self._parts)
        if pattern is None:
            return text
        text = pattern.sub(lambda match: self._alias[match.group()], text)
        if not own_words or self._words is None:
            return self._hide_ends(text, parts)
        # A template may take the thought out of an answer: its neighbours have ends of their own.
        words, rest = self._words.findall(text), self._words.split(text)
        hidden = [self._hide_ends(part, parts) for part in rest]
        return "".join(part + word for part, word in zip(hidden, [*words, ""], strict=True))

    def _hide_ends(self, text: str, parts: _Parts) -> str:
        """Aliases for a beginning of a marker at the text's end and an end of one at its beginning, white
        space aside: a template may trim it."""
        body = text.rstrip()
        for size in range(min(len(body), parts.longest), 0, -1):
            if body[-size:] in parts.heads:
                text = body[:-size] + self._alias_of(body[-size:]) + text[len(body) :]
                break
        body = text.lstrip()
        for size in range(min(len(body), parts.longest), 0, -1):
            if body[:size] in parts.tails:
                return text[: len(text) - len(body)] + self._alias_of(body[:size]) + body[size:]
        return text

    def _alias_of(self, part: str) -> str:
        if part not in self._alias:
            self._alias[part] = f"\ue002{self._nonce}{next(self._numbers):x}\ue003"
            self._spelled[self._alias[part]] = part
        return self._alias[part]

    def show(self, text: str) -> str:
        """The text with its aliases spelled out again."""
        return self._aliased.sub(lambda match: self._spelled[match.group()], text)

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where a rendered text (its contents hidden) has control tokens of the template's own."""
        return [match.span() for match in self._special.finditer(text)] if self._special else []

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Ids of a rendered text cut before each trained span, and which of them are trained.

        Each piece is encoded on its own, so ids before a trained span are those of the prompt that
        inference feeds. A later piece gets a dummy space only where the reference gives one: after
        a marker, if this tokenizer puts one there.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for number, piece in enumerate(pieces):
            own, rest = self._swap(piece.text[: piece.trained]), self._swap(piece.text[piece.trained :])
            after_marker = bool(ids) and ids[-1] in self._added_ids
            begins = number == 0 or (after_marker and self._prefix == "always")
            for part_ids, starts in self._encode_piece(own + rest, begins=begins):
                ids += part_ids
                trained += [start < len(own) for start in starts]
        return ids, trained

    def _encode_piece(self, text: str, *, begins: bool) -> list[tuple[list[int], list[int]]]:
        """Ids and the character each begins at, in one or two parts."""
        if begins or self._prefix == "none":
            return [self._encoded(self._guarded, text, 0)]
        marker = self._named.search(text)
        head = len(text) if marker is None or self._prefix == "first" else marker.start()
        return [self._encoded(self._rest, text[:head], 0), self._encoded(self._guarded, text[head:], head)]

    def _encoded(self, backend: tokenizers.Tokenizer, text: str, at: int) -> tuple[list[int], list[int]]:
        if not text:
            return [], []
        encoding = backend.encode(text, add_special_tokens=False)
        ids = [self._true_id.get(number, number) for number in encoding.ids]
        return ids, [at + start for start, _ in encoding.offsets]

    def _ids(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        return self._encoded(backend, text, 0)[0]

    def _swap(self, text: str) -> str:
        """Markers -> private names, then aliases -> the ordinary text they stand for."""
        if self._marker:
            text = self._marker.sub(lambda match: self._private[match.group()], text)
        return self.show(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self._plain.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self) -> Stream:
        """A decoder for ids that come one by one."""
        return Stream(self)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return str(self._plain.to_str())

    def files(self) -> dict[str, bytes]:
        """What to save beside a model so that other tools read the same tokenizer."""
        keep = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token")
        config = {key: self.config[key] for key in keep if self.config.get(key) is not None}
        if self.text_tokens:
            config[TEXT_TOKENS] = self.text_tokens
        config |= {"tokenizer_class": LIBRARY_CLASS, "clean_up_tokenization_spaces": False}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self.to_json().encode(), "tokenizer_config.json": text.encode()}

    def _renamed(self, described: Json) -> Json:
        """The tokenizer with private names for its added tokens, in the vocabulary too."""
        renamed: Json = json.loads(json.dumps(described))
        renamed |= {"post_processor": None, "truncation": None, "padding": None}
        for token in renamed.get("added_tokens", []):
            token["content"] = self._private.get(token["content"], token["content"])
        model = renamed["model"]
        if model.get("unk_token") in self._private:
            model["unk_token"] = self._private[model["unk_token"]]
        if isinstance(model["vocab"], dict):
            for token, private in self._private.items():
                if token in model["vocab"]:
                    model["vocab"][private] = model["vocab"].pop(token)
            if "merges" in model:
                model["merges"] = [merge for merge in model["merges"] if self._is_text(merge)]
        else:
            model["vocab"] = [[self._private.get(t, t), score] for t, score in model["vocab"]]
        return renamed

    def _is_text(self, merge: list[str] | str) -> bool:
        """Whether a merge neither takes nor makes an added token; files write it as a pair or a text."""
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return not {left, right, left + right} & self._added.keys()


class Stream:
    """Text from ids as they come: never half a character, never a space that later moves."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = 0  # ids before this are decoded for good; kept a little for their context
        self._done = 0

    def push(self, number: int) -> str:
        """What can be shown now that this id came."""
        self._ids.append(number)
        return self._emit(last=False)

    def finish(self) -> str:
        """What was still held back."""
        return self._emit(last=True)

    def _emit(self, *, last: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._from : self._done])
        text = self._tokenizer.decode(self._ids[self._from :])
        if not last and (text.endswith("\ufffd") or self._in_bytes()):
            return ""
        if len(text) <= len(before):
            return ""
        self._from, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def _in_bytes(self) -> bool:
        """Whether a run of byte tokens is still open: one bad byte would change all of its text."""
        words = (number for number in reversed(self._ids) if not self._tokenizer.is_special(number))
        return next(words, None) in self._tokenizer.byte_ids


def _described(text: str) -> Json:
    """tokenizer.json as a value. Raises BaseError.

    The library ends with a panic on a table of characters that is none, so that is looked at here.
    """
    try:
        described = json.loads(text)
        if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
            raise ValueError("it is not an object with a `model`")
        for step in _steps(described.get("normalizer"), "normalizers"):
            if step.get("type") == "Precompiled":
                table = base64.b64decode(str(step.get("precompiled_charsmap")), validate=True)
                if not 4 < 4 + int.from_bytes(table[:4], "little") <= len(table):
                    raise ValueError("`precompiled_charsmap` is cut short")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseError(f"the tokenizer cannot be read: {error}", fix=SAVE) from error
    return described


def _byte_ids(described: Json) -> frozenset[int]:
    vocabulary = described["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else []
    return frozenset(number for token, number in pairs if BYTE_NAME.fullmatch(token))


def _any_of(tokens: Sequence[str] | Mapping[str, Any]) -> re.Pattern[str] | None:
    """A pattern that finds the longest of these at the leftmost place."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _steps(part: Json | None, key: str) -> list[Json]:
    if part is None:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _prefix_scheme(described: Json) -> str:
    """Whether a space is put before a text's beginning (`first`), before each stretch between
    markers (`always`), or not at all (`none`)."""
    scheme = "none"
    for step in _steps(described.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            scheme = "always"
    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            said = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            scheme = scheme if said == "never" else said
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            scheme = "always"
    return scheme


def _without_prefix(described: Json) -> Json:
    normalizers = _steps(described.get("normalizer"), "normalizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    described["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return described
