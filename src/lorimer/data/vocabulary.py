"""A GGUF file's vocabulary -> the text of a tokenizer.json that the tokenizers library loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorimer.data.cuts import BYTE_LEVEL, CUTS, Cut, Json, cut_name
from lorimer.errors import BaseError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Kinds of vocabularies that are not read, in the words of their inventors.
OTHER_KINDS = {
    "t5": "SentencePiece unigram",
    "bert": "WordPiece",
    "rwkv": "RWKV's tree",
    "plamo2": "PLaMo's table",
    "none": "no text at all",
    "no_vocab": "no text at all",
}
# What llama.cpp takes for a SentencePiece file that does not say.
SENTENCE_PIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether plain text begins with the bos token. Where the file does not say, as llama.cpp does."""
    default = metadata.get("tokenizer.ggml.model") in ("llama", "gemma4")
    cut = CUTS.get(cut_name(metadata) or "")
    default |= metadata.get("tokenizer.ggml.model") == "gpt2" and cut is not None and cut.adds_bos
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def adds_eos(metadata: Mapping[str, Any]) -> bool:
    """Whether plain text ends with the eos token."""
    return bool(metadata.get("tokenizer.ggml.add_eos_token", False))


def role_id(metadata: Mapping[str, Any], role: str) -> int | None:
    """The id of the bos, eos, unknown or padding token; None if there is none in the vocabulary."""
    number = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if number is None and metadata.get("tokenizer.ggml.model") == "llama":
        number = SENTENCE_PIECE_IDS.get(role)
    tokens = metadata.get("tokenizer.ggml.tokens")
    inside = type(number) is int and isinstance(tokens, list) and 0 <= number < len(tokens)
    return number if inside else None


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The vocabulary in GGUF metadata as tokenizer.json text.

    Byte-level BPE (`gpt2`) and SentencePiece's BPE, by scores (`llama`) or merges (`gemma4`), are known.
    Raises BaseError otherwise.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BaseError("the GGUF file has no vocabulary", fix="Choose a file that keeps its tokenizer.")
    types = _listed(metadata, "token_type", int) or [NORMAL] * len(tokens)
    scores = _listed(metadata, "scores", float, int) or [0.0] * len(tokens)
    # llama.cpp names a token without a text so.
    tokens = [token or f"[EMPTY_{n}]" for n, token in enumerate(_listed(metadata, "tokens", str))]
    if len(types) != len(tokens) or len(scores) != len(tokens) or len(set(tokens)) != len(tokens):
        raise BaseError(
            f"the GGUF file's vocabulary is damaged: {len(tokens):,} tokens ({len(set(tokens)):,} "
            f"different), {len(types):,} types, {len(scores):,} scores",
            fix="Download the file again.",
        )
    if kind == "gpt2":
        built = _byte_level(metadata, tokens)
    elif kind in ("llama", "gemma4"):
        merges = _scored_merges(tokens, types, scores) if kind == "llama" else _merges(metadata)
        built = _sentence_piece(metadata, tokens, types, merges)
    else:
        about = OTHER_KINDS.get(str(kind))
        raise BaseError(
            f"the vocabulary kind `{kind}`{f' ({about})' if about else ''} is not supported",
            fix="Supported: gpt2 (byte-level BPE), llama (SentencePiece BPE), gemma4.",
        )
    strips = _strips(metadata)
    added = [
        _added(number, token, special=types[number] in (CONTROL, UNKNOWN), strips=token in strips)
        for number, token in enumerate(tokens)
        if types[number] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    base: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return json.dumps(base | {"post_processor": _ends(metadata, tokens)} | built, ensure_ascii=False)


def _listed(metadata: Mapping[str, Any], key: str, *kinds: type) -> list[Any]:
    """A list of the vocabulary; [] if it is not there. Raises BaseError if it holds something else."""
    value = metadata.get(f"tokenizer.ggml.{key}") or []
    if not isinstance(value, list) or not all(type(each) in kinds for each in value):
        raise BaseError(
            f"the GGUF file's vocabulary is damaged: `{key}` is not a list of {kinds[0].__name__}",
            fix="Download the file again.",
        )
    return value


def _merges(metadata: Mapping[str, Any]) -> list[list[str]]:
    # A token may begin with a space of its own.
    merges = [(merge, merge.find(" ", 1)) for merge in _listed(metadata, "merges", str)]
    return [[merge[:at], merge[at + 1 :]] if at > 0 else [merge] for merge, at in merges]


def _ends(metadata: Mapping[str, Any], tokens: list[str]) -> Json | None:
    """What puts the bos and eos tokens around a text, for other tools that read this tokenizer."""
    bos = role_id(metadata, "bos") if adds_bos(metadata) else None
    eos = role_id(metadata, "eos") if adds_eos(metadata) else None
    if bos is None and eos is None:
        return None
    ends = {tokens[number]: number for number in (bos, eos) if number is not None}
    first, last = ([] if n is None else [_special(tokens[n])] for n in (bos, eos))
    one: Json = {"Sequence": {"id": "A", "type_id": 0}}
    two: Json = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [*first, one, *last],
        "pair": [*first, one, two, *last],
        "special_tokens": {t: {"id": t, "ids": [number], "tokens": [t]} for t, number in ends.items()},
    }


def _special(token: str) -> Json:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _strips(metadata: Mapping[str, Any]) -> set[str]:
    """Tokens that take the spaces behind them. The file does not say; Phi-3's do, and llama.cpp knows."""
    if metadata.get("general.architecture") != "phi3" or metadata.get("tokenizer.ggml.model") != "llama":
        return set()
    return set(metadata["tokenizer.ggml.tokens"]) - {"<unk>", "<s>", "<|endoftext|>"}


def _added(number: int, token: str, *, special: bool, strips: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": strips, "normalized": False}
    return {"id": number, "content": token, "special": special} | flags


def _cut_of(metadata: Mapping[str, Any]) -> Cut:
    name = cut_name(metadata)
    if name in CUTS:
        return CUTS[name]
    what = "does not say how it cuts text" if name is None else f"cuts text in the way `{name}`"
    raise BaseError(
        f"this vocabulary {what}, and ids would be wrong" + ("" if name is None else ": it is not known"),
        fix=f"Known: {', '.join(CUTS)}. A newer GGUF file or the model's Hugging Face folder works.",
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Json:
    cut = _cut_of(metadata)
    model = _bpe({token: i for i, token in enumerate(tokens)}, _merges(metadata))
    return {
        "normalizer": {"type": "NFC"} if cut.composes else None,
        "pre_tokenizer": (
            cut.steps[0] if len(cut.steps) == 1 else {"type": "Sequence", "pretokenizers": cut.steps}
        ),
        "decoder": BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
        "model": model | {"ignore_merges": cut.whole_words},
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _scored_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """SentencePiece's BPE joins the pair whose result scores best, so scores give the merges."""
    words = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind == NORMAL:
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            merges += [(score, pair) for pair in pairs if words.issuperset(pair)]
    merges.sort(key=lambda item: (item[0], len(item[1][0]), len(item[1][1])), reverse=True)
    return [list(pair) for _, pair in merges]


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[list[str]]
) -> Json:
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", metadata["tokenizer.ggml.model"] == "llama")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, spaces] if prefix else [spaces]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe({token: i for i, token in enumerate(tokens)}, merges)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }
