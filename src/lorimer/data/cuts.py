"""How byte-level BPE cuts a text before it merges, for each name that llama.cpp has for it.

The steps are those of the models' own tokenizer.json files. llama.cpp computes them by expressions of
its own, which differ from these for a few rare characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

BYTE_LEVEL: Json = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
GPT2_SPLIT: Json = BYTE_LEVEL | {"use_regex": True}


def split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def digits(*, individual: bool) -> Json:
    return {"type": "Digits", "individual_digits": individual}


# What the patterns have in common: English endings, runs of signs, line ends, and spaces of which the last
# stays with the word behind them.
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
AHEAD = r"[^\r\n\p{L}\p{N}]?"

LLAMA3 = rf"{ENDINGS}|{AHEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# A word ends where an upper case letter follows a lower case one.
TEKKEN = rf"{AHEAD}{UPPER}*{LOWER}+|{AHEAD}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = (
    rf"{AHEAD}{UPPER}*{LOWER}+{ENDINGS}?|{AHEAD}{UPPER}+{LOWER}*{ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
# GPT-2's, as an expression of its own; ByteLevel has it built in.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Letters that have an upper and a lower case, as the model lists them.
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
DEEPSEEK_LLM = [
    split("[\r\n]"),
    split(rf"\s?[{CASED}]+"),
    split(r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002" + "]+"),
    split(r"\s+$"),
    split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
    digits(individual=True),
    BYTE_LEVEL,
]
DEEPSEEK_CODER = [
    split("[\r\n]"),
    split(r"\s?\p{L}+"),
    split(r"\s?\p{P}+"),
    split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
    digits(individual=True),
    BYTE_LEVEL,
]
DEEPSEEK_V3 = [
    split(r"\p{N}{1,3}"),
    split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    split(
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
    ),
    BYTE_LEVEL,
]
# After ByteLevel a step sees the letters that stand for bytes, so these two are not the same.
FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    GPT2_SPLIT,
    digits(individual=False),
    split("[0-9][0-9][0-9]"),
]
DEFAULT = [
    split(r"[\p{P}\$\+<=>\^~\|]+"),
    split(GPT2),
    split(r"\p{N}+"),
    split("[0-9][0-9][0-9]"),
    BYTE_LEVEL,
]
EACH_DIGIT = [digits(individual=True), GPT2_SPLIT]


@dataclass(frozen=True, slots=True)
class Cut:
    """`steps` are pre-tokenizers of the tokenizers library; `composes`: characters are composed first
    (NFC); `whole_words`: a word that is in the vocabulary is taken before any merge; `adds_bos`: texts
    begin with the bos token where the file does not say."""

    steps: list[Json]
    composes: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA3 = Cut([split(LLAMA3), BYTE_LEVEL], whole_words=True, adds_bos=True)
_QWEN2 = Cut([split(QWEN2), BYTE_LEVEL])
CUTS: dict[str, Cut] = {
    # What llama.cpp does for a name that says nothing; no model that is known was made so.
    "default": Cut(DEFAULT),
    # GPT-2, Phi-1 to 2.
    "gpt-2": Cut([GPT2_SPLIT]),
    # SmolLM 1 and 2, Starcoder 1 and 2, Granite 3; Command R composes characters first.
    "smollm": Cut(EACH_DIGIT),
    "command-r": Cut(EACH_DIGIT, composes=True),
    # OLMo 1, GPT-NeoX, Pythia, MPT.
    "olmo": Cut([GPT2_SPLIT], composes=True),
    # Llama 3, Falcon 3, Pixtral, LFM 2.
    "llama-bpe": _LLAMA3,
    # Llama 3's or GPT-4's cut, but a word is merged even if it is a token: SmolLM3, OLMo 2, Phi-4, GLM-4.
    "dbrx": Cut([split(LLAMA3), BYTE_LEVEL]),
    # Qwen 1.5 to 3, StableLM 2; DeepSeek R1's distillation does not compose characters.
    "qwen2": Cut([split(QWEN2), BYTE_LEVEL], composes=True),
    "deepseek-r1-qwen": _QWEN2,
    # Mistral Nemo and what came after it.
    "tekken": Cut([split(TEKKEN), BYTE_LEVEL], whole_words=True, adds_bos=True),
    # Phi-4 mini, Llama 4, gpt-oss.
    "gpt-4o": Cut([split(GPT4O), BYTE_LEVEL]),
    "falcon": Cut(FALCON),
    "deepseek-llm": Cut(DEEPSEEK_LLM),
    "deepseek-coder": Cut(DEEPSEEK_CODER),
    "deepseek-v3": Cut(DEEPSEEK_V3),
}
# Other names that llama.cpp gives to the same cut.
_OTHERS = {
    "gpt-2": ("phi-2",),
    "smollm": ("starcoder", "refact"),
    "olmo": ("mpt",),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "qwen2": ("stablelm2",),
    "deepseek-r1-qwen": ("megrez",),
    "gpt-4o": ("llama4",),
}
CUTS |= {other: CUTS[name] for name, others in _OTHERS.items() for other in others}
# Files older than the names: the architectures whose models were all cut alike.
UNNAMED = {
    "gpt2": "gpt-2",
    "phi2": "phi-2",
    "gptneox": "olmo",
    "mpt": "mpt",
    "falcon": "falcon",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
    "qwen2": "qwen2",
    "command-r": "command-r",
}


def cut_name(metadata: Mapping[str, Any]) -> str | None:
    """The name that the file gives, or that its architecture implies; None if neither."""
    named = metadata.get("tokenizer.ggml.pre")
    return UNNAMED.get(str(metadata.get("general.architecture"))) if named is None else str(named)
