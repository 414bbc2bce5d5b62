"""A tokenizer as the metadata of a GGUF file.

Byte-level BPE and SentencePiece's BPE have a form there; anything else, or a way of splitting text
that llama.cpp has no name for, is refused. What was made is read back and must give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorimer.data.cuts import CUTS
from lorimer.data.tokenizer import BYTE_NAME, GGUF_TEXT_TOKENS, Json, Tokenizer
from lorimer.data.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from lorimer.errors import BaseError
from lorimer.model.grow import GrownBase

# Texts whose ids show a wrong splitting, merge order, digit rule, space rule or byte fallback.
PROBES = (
    "Hello, world!",
    " a  b   c\n\n\nd \t e",
    "12345 3.14159 1,000 2024-01-31",
    "I'm you're he'LL DON'T can't",
    "naïve café ÜNÏ straße e\u0301",
    "日本語のテキスト。한국어 中文",
    "مرحبا 👩‍👩‍👧‍👦 🇩🇪 ∑∫√",
    'def f(x):\n    return {"a": [1, 2]}  # done\r\n',
    "▁already▁there _under_ ####",
    "\u00a0\u200b\ufeff end ",
)


def vocabulary_entries(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys, for an embedding of `rows` rows.

    Raises BaseError where the tokenizer has no exact form in a GGUF file.
    """
    described: Json = json.loads(tokenizer.to_json())
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(f"it is of the kind {model['type']}")
    made = _sentence_piece(described) if model.get("byte_fallback") else _byte_level(described)
    tokens, types = _tokens(described, rows)
    made |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if made["tokenizer.ggml.model"] == "llama":
        made["tokenizer.ggml.scores"] = _scores(model, tokens)
    else:
        made["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(model)]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in roles.items():
        text = tokenizer.token_text(ours)
        number = None if text is None else tokenizer.id(text)
        if number is not None:
            made[f"tokenizer.ggml.{theirs}_token_id"] = number
    made["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    if tokenizer.config.get("add_eos_token"):
        made["tokenizer.ggml.add_eos_token"] = True
    made |= text_tokens(tokenizer.text_tokens)
    _check(tokenizer, made)
    return made


def grown_vocabulary(metadata: Mapping[str, Any], base: GrownBase, architecture: str) -> dict[str, Any]:
    """A GGUF base's own lists of tokens with those that were added, at their ids."""
    found = {}
    empty = {"tokens": "[PAD{}]", "token_type": UNUSED, "scores": 0.0}
    for name, filler in empty.items():
        if (old := metadata.get(f"tokenizer.ggml.{name}")) is None:
            continue
        more = range(len(old), base.rows)
        found[f"tokenizer.ggml.{name}"] = [*old, *(_filled(filler, n) for n in more)]
    kinds = [USER_DEFINED] * len(base.added.text) + [CONTROL] * len(base.added.special)
    for number, token, kind in zip(base.added_ids, base.added.all, kinds, strict=True):
        found["tokenizer.ggml.tokens"][number] = token
        found["tokenizer.ggml.token_type"][number] = kind
    sizes = [key for key in metadata if key == f"{architecture}.vocab_size"]
    return found | dict.fromkeys(sizes, base.rows) | text_tokens(base.added.text)


def text_tokens(tokens: Sequence[str]) -> dict[str, Any]:
    return {GGUF_TEXT_TOKENS: list(tokens)} if tokens else {}


def _filled(filler: Any, number: int) -> Any:
    return filler.format(number) if isinstance(filler, str) else filler


def end_of_turn(tokenizer: Tokenizer, end_ids: Sequence[int]) -> dict[str, Any]:
    """The token that ends an answer, where it is not the one that ends a text."""
    others = [number for number in end_ids if number != tokenizer.eos_id and tokenizer.is_special(number)]
    return {"tokenizer.ggml.eot_token_id": others[0]} if others else {}


def _refused(why: str) -> BaseError:
    return BaseError(
        f"this tokenizer has no exact form in a GGUF file: {why}",
        fix="Use `--to merged`, and llama.cpp's convert_hf_to_gguf.py on that folder.",
    )


def _steps(part: Json | None, key: str) -> list[Json]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _byte_level(described: Json) -> dict[str, Any]:
    """llama.cpp's name for how the text is cut before merging."""
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    normalizers = [step["type"] for step in _steps(described.get("normalizer"), "normalizers")]
    cut = [_cut(step) for step in steps]
    whole_words = bool(described["model"].get("ignore_merges"))
    # Where several names have the same form, the first in the table stands for all.
    known = {
        (("NFC",) if cut.composes else (), tuple(map(_cut, cut.steps)), cut.whole_words): name
        for name, cut in reversed(CUTS.items())
    }
    name = known.get((tuple(normalizers), tuple(cut), whole_words))
    if name is None:
        raise _refused("llama.cpp has no name for how it cuts text, as far as is known here")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}


def _cut(step: Json) -> str:
    """What a step of the splitting does, in a word."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes+split" if step.get("use_regex", True) else "bytes"
    if kind == "Digits":
        return "digits" if step.get("individual_digits") else "runs of digits"
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return "punctuation"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return f"unknown {kind}"


def _sentence_piece(described: Json) -> dict[str, Any]:
    """Whether a space is put before a text, as a Prepend or a Metaspace step says."""
    prefix = False
    for step in _steps(described.get("normalizer"), "normalizers"):
        if step["type"] not in ("Prepend", "Replace"):
            raise _refused(f"llama.cpp has no {step['type']} before its SentencePiece")
        prefix |= step["type"] == "Prepend"
    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split" and step["pattern"] == {"String": " "} and _replaces_spaces(described):
            continue  # Gemma's, which finds none any more
        if step["type"] != "Metaspace":
            raise _refused(f"llama.cpp has no {step['type']} in its SentencePiece")
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        prefix |= scheme != "never"
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _replaces_spaces(described: Json) -> bool:
    steps = _steps(described.get("normalizer"), "normalizers")
    return any(step["type"] == "Replace" and step["pattern"] == {"String": " "} for step in steps)


def _tokens(described: Json, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each id; ids that the tokenizer leaves out are named and marked unused."""
    model = described["model"]
    names = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    falls_back = bool(model.get("byte_fallback"))
    names |= {
        # llama.cpp looks for these in the text before it writes spaces as lines.
        number: text["content"].replace("▁", " ") if falls_back and not text["special"] else text["content"]
        for number, text in added.items()
    }
    if max(names) >= rows:
        raise _refused(f"it has ids up to {max(names):,}, the model {rows:,} rows for them")
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    if len(set(tokens)) != len(tokens):
        raise _refused("two of its ids have the same text")

    def kind(number: int, token: str) -> int:
        if number not in names:
            return UNUSED
        if falls_back and BYTE_NAME.fullmatch(token):
            return BYTE
        if token == model.get("unk_token"):
            return UNKNOWN
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        return NORMAL

    return tokens, [kind(number, token) for number, token in enumerate(tokens)]


def _merges(model: Json) -> list[list[str]]:
    """The merges as pairs; files write them as pairs or as one text."""
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]


def _scores(model: Json, tokens: list[str]) -> list[float]:
    """SentencePiece joins the pair whose result scores best: the first merge that makes a token."""
    made: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        made.setdefault(left + right, rank)
    last = len(model["merges"])
    return [-float(made.get(token, last)) for token in tokens]


def _check(tokenizer: Tokenizer, made: dict[str, Any]) -> None:
    again = Tokenizer.from_gguf(made)
    for text in PROBES:
        # A space in front is space_note's subject.
        text = text.lstrip(" ▁") if made["tokenizer.ggml.model"] == "llama" else text
        if again.encode_content(text) != tokenizer.encode_content(text):
            raise _refused(f"{text!r} would become other ids")


def space_note(tokenizer: Tokenizer, made: Mapping[str, Any]) -> str | None:
    """What to know where llama.cpp puts a space before text and this tokenizer does not.

    SentencePiece's own rule, and llama.cpp's, puts one before every stretch of text; newer
    tokenizer.json files leave it out before a space, or after a control token.
    """
    again = Tokenizer.from_gguf(made)
    marker = tokenizer.token_text("eos") or tokenizer.token_text("bos") or ""
    texts = (" a", f"{marker}a", f"{marker} a")
    differ = [text for text in texts if again.encode(text) != tokenizer.encode(text)]
    if not differ:
        return None
    shown = ", ".join(map(repr, differ))
    return f"llama.cpp puts one more space before some texts than this tokenizer: {shown}"
