"""A GGUF file's vocabulary -> the text of a tokenizer.json that the tokenizers library loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorimer.errors import BaseError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Json = dict[str, Any]

BYTE_LEVEL: Json = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
GPT2_SPLIT: Json = BYTE_LEVEL | {"use_regex": True}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# How text is cut before merging, for each name that llama.cpp gives; facts of the models' own files.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS: dict[str, list[Json]] = {
    "default": [GPT2_SPLIT],
    "gpt-2": [GPT2_SPLIT],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2_SPLIT],
    "llama-bpe": [_split(LLAMA3), BYTE_LEVEL],
    "qwen2": [_split(QWEN2), BYTE_LEVEL],
}
# Other names that llama.cpp gives to the same splitting.
PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3", "falcon3"), PRE_TOKENIZERS["llama-bpe"])
PRE_TOKENIZERS |= dict.fromkeys(("deepseek-r1-qwen", "megrez"), PRE_TOKENIZERS["qwen2"])
PRE_TOKENIZERS |= dict.fromkeys(("starcoder", "refact", "command-r"), PRE_TOKENIZERS["smollm"])
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3")


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether plain text begins with the bos token. Where the file does not say, as llama.cpp does."""
    default = metadata.get("tokenizer.ggml.model") == "llama"
    default |= metadata.get("tokenizer.ggml.pre") in LLAMA3_NAMES
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The vocabulary in GGUF metadata as tokenizer.json text.

    Byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) are known. Raises BaseError otherwise.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BaseError("the GGUF file has no vocabulary", fix="Choose a file that keeps its tokenizer.")
    types = _listed(metadata, "token_type", int) or [NORMAL] * len(tokens)
    scores = _listed(metadata, "scores", float) or [0.0] * len(tokens)
    _listed(metadata, "tokens", str)
    if len(types) != len(tokens) or len(scores) != len(tokens) or len(set(tokens)) != len(tokens):
        raise BaseError(
            f"the GGUF file's vocabulary is damaged: {len(tokens):,} tokens ({len(set(tokens)):,} "
            f"different), {len(types):,} types, {len(scores):,} scores",
            fix="Download the file again.",
        )
    if kind == "gpt2":
        built = _byte_level(metadata, tokens)
    elif kind == "llama":
        built = _sentence_piece(metadata, tokens, types, scores)
    else:
        raise BaseError(f"the vocabulary kind `{kind}` is not supported", fix="Supported: gpt2, llama.")
    added = [
        _added(number, token, special=types[number] in (CONTROL, UNKNOWN))
        for number, token in enumerate(tokens)
        if types[number] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    base: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return json.dumps(base | {"post_processor": _begin(metadata, tokens)} | built, ensure_ascii=False)


def _listed(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """A list of the vocabulary; [] if it is not there. Raises BaseError if it holds something else."""
    value = metadata.get(f"tokenizer.ggml.{key}") or []
    if not isinstance(value, list) or not all(type(each) is kind for each in value):
        raise BaseError(
            f"the GGUF file's vocabulary is damaged: `{key}` is not a list of {kind.__name__}",
            fix="Download the file again.",
        )
    return value


def _begin(metadata: Mapping[str, Any], tokens: list[str]) -> Json | None:
    """What puts the bos token before a text, for other tools that read this tokenizer."""
    number = metadata.get("tokenizer.ggml.bos_token_id")
    if not adds_bos(metadata) or not isinstance(number, int) or not 0 <= number < len(tokens):
        return None
    token = tokens[number]
    bos: Json = {"SpecialToken": {"id": token, "type_id": 0}}
    one: Json = {"Sequence": {"id": "A", "type_id": 0}}
    two: Json = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, two],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _added(number: int, token: str, *, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, "special": special} | flags


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Json:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in PRE_TOKENIZERS:
        raise BaseError(
            f"the text splitting `{name}` of this vocabulary is not known",
            fix=f"Known: {', '.join(PRE_TOKENIZERS)}. The model's Hugging Face folder works instead.",
        )
    steps = PRE_TOKENIZERS[name]
    merges = [merge.split(" ", 1) for merge in _listed(metadata, "merges", str)]
    model = _bpe({token: i for i, token in enumerate(tokens)}, merges)
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
        # Llama 3 takes a word that is in the vocabulary whole, before any merge.
        "model": model | {"ignore_merges": name == "llama-bpe"},
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


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], scores: list[float]
) -> Json:
    """SentencePiece's BPE: it joins the pair whose result scores best, so scores give the merges."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    words = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind == NORMAL:
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            merges += [(score, pair) for pair in pairs if words.issuperset(pair)]
    merges.sort(key=lambda item: (item[0], len(item[1][0]), len(item[1][1])), reverse=True)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, spaces] if prefix else [spaces]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(vocabulary, [list(pair) for _, pair in merges])
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }
