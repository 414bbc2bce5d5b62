"""Texts that tokenizers get wrong, and small tokenizers of every kind to try them on."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from lorimer.data.cuts import CUTS, LLAMA3
from lorimer.data.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

PLAIN = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "a ",
    "  two before and two after  ",
    "\tindent\t\ttabs\t",
    "line one\r\nline two\r\n\r\nline four",
    "many" + " " * 40 + "spaces",
    " " * 70,
    "\n" * 9 + "x",
    "a \n \n b",
    "12345 and 3.14159, 1,000,000 or 1e-9 (007)",
    "I'm you're he'll we've DON'T can't it's o'clock",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # done\n",
    '{"intent":"HassLightSet","slots":{"brightness":50}}',
    "<html><body class='x'>&nbsp;</body></html>",
    "C:\\new\\table \\boxed{42} {{ x }} {% if y %} {# z #}",
    "naïve café, Ünïcödé, ſtraße, İstanbul",
    "e\u0301 a\u0308 o\u0302\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A",
    "日本語のテキスト。中文，没有空格 한국어 텍스트",
    "مرحبا بالعالم، שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 1️⃣",
    "zero\u200bwidth\u200djoin\ufeffbom \u00a0nbsp\u3000ideographic \u2028line sep",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f",
    "\ufffd replacement \ue000 private \U0010ffff last",
    "▁underline▁ ▁ Ġ Ċ byte letters <0x0A> <0xE2>",
    "x" * 300,
    "https://example.org/a?b=c&d=%20#e user@example.org",
]
# Numbers that are no ASCII digits: some conversions forget to split them.
NUMERIC = ["٣٤٥ Ⅷ ½ 1² ①", "१२३ 四五"]
SPELLED = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "say <|im_end|> please",
    "<|im_end|><|im_end|>  <|im_start|> ",
    " <|im_start|>assistant",
    "<|im_end",
    "|im_end|>",
    "<|im_<|im_end|>end|>",
    "<think>hm</think> <tool_call>{}</tool_call>",
    "<think><|im_end|></think>",
    "end</s>next<s>",
]
HARD = PLAIN + NUMERIC + SPELLED

CONTROLS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then some more of the same old story",
    "user asks what the weather is like; assistant answers that it is warm and a little windy",
    "turn the living room lights on and set the brightness to 50 percent please",
    "<|im_start|>user <|im_end|> <|im_start|>assistant <s> </s> <think> </think>",
    *PLAIN,
] * 3


def _finish(tokenizer: Tokenizer, **words: bool) -> str:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROLS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False, **words) for token in WORDS])
    described = json.loads(tokenizer.to_str())
    # The trainer lists the bytes as special tokens; no released tokenizer does.
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(described, ensure_ascii=False)


def _trained(tokenizer: Tokenizer, size: int, **settings: Any) -> Tokenizer:
    # Merges may cross anything that the pre-tokenizer leaves whole, so markers get merges as well.
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **settings)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def byte_level(*, prefix: bool = False) -> str:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _finish(_trained(tokenizer, 500, initial_alphabet=alphabet, special_tokens=CONTROLS))


@cache
def llama3_like() -> str:
    """Split by Llama 3's pattern; whole words first; the post-processor puts <s> in front."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(tokenizer, 500, initial_alphabet=alphabet)  # control tokens come after the vocabulary
    _finish(tokenizer)
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", begin)
    return str(tokenizer.to_str())


@cache
def cut_as(name: str) -> str:
    """A small vocabulary trained on text cut in the way that llama.cpp calls so."""
    tokenizer = Tokenizer.from_str(json.dumps(_empty(name)))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _finish(_trained(tokenizer, 700, initial_alphabet=alphabet, special_tokens=CONTROLS))


def _empty(name: str) -> dict[str, Any]:
    described = json.loads(Tokenizer(models.BPE(ignore_merges=CUTS[name].whole_words)).to_str())
    return described | {
        "normalizer": {"type": "NFC"} if CUTS[name].composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[name].steps},
    }


def _bytes() -> list[str]:
    return [f"<0x{number:02X}>" for number in range(256)]


@cache
def prepend() -> str:
    """SentencePiece in the form of Llama 2's tokenizer.json: a Prepend normalizer, no pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _fuse()
    return _finish(_trained(tokenizer, 600, special_tokens=[*CONTROLS[:3], *_bytes()]), lstrip=True)


@cache
def metaspace(scheme: str = "first") -> str:
    """SentencePiece in the form that newer conversions write: a Metaspace pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = _fuse()
    return _finish(_trained(tokenizer, 600, special_tokens=[*CONTROLS[:3], *_bytes()]), rstrip=True)


SPACES = [*("▁" * length for length in range(2, 9)), "\n\n"]


@cache
def gemma() -> str:
    """SentencePiece in Gemma's form: no space in front, and runs of spaces among the added tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Nothing that is learnt merges within a run of spaces or lines, or across it.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁(?=▁)|(?<=▁)▁|\n"), "isolated")
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    _trained(tokenizer, 700, special_tokens=[*CONTROLS[:3], *_bytes()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in SPACES])
    described = json.loads(_finish(tokenizer))
    # They are merged before anything else, the short ones first.
    model, added = described["model"], {t["content"]: t["id"] for t in described["added_tokens"]}
    model["vocab"] |= {token: added[token] for token in SPACES}
    runs = [[run[:i], run[i:]] for run in SPACES for i in range(1, len(run))]
    model["merges"] = runs + [pair for pair in model["merges"] if pair not in runs]
    return json.dumps(described, ensure_ascii=False)


def _fuse() -> Any:
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    return decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])


KINDS = {
    "byte level": byte_level,
    "byte level with a prefix space": lambda: byte_level(prefix=True),
    "llama 3": llama3_like,
    "prepend": prepend,
    "metaspace first": metaspace,
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "gemma": gemma,
}
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gguf_byte_level(pre: str = "smollm", text: str | None = None) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a byte-level tokenizer."""
    described = json.loads(text or byte_level())
    added = {token["id"]: token["special"] for token in described["added_tokens"]}
    vocabulary = described["model"]["vocab"] | {t["content"]: t["id"] for t in described["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {True: CONTROL, False: USER_DEFINED, None: NORMAL}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds[added.get(number)] for number in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary["<s>"],
        "tokenizer.ggml.eos_token_id": vocabulary["</s>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def vocabulary_of(text: str) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a tokenizer.json with byte fallback.

    A pair that merges sooner scores higher; tokens of the user's are written with their spaces.
    """
    described = json.loads(text)
    vocabulary, added = described["model"]["vocab"], {t["id"]: t for t in described["added_tokens"]}
    names = {number: token for token, number in vocabulary.items()}
    names |= {number: t["content"] for number, t in added.items()}
    rank = {"".join(pair): -float(n) for n, pair in reversed(list(enumerate(described["model"]["merges"])))}

    def kind(number: int) -> int:
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        return BYTE if names[number].startswith("<0x") else NORMAL

    ordered = [names[number] for number in range(len(names))]
    kinds = [UNKNOWN if token == "<unk>" else kind(n) for n, token in enumerate(ordered)]
    plain = [
        token.replace("▁", " ") if kind == USER_DEFINED else token
        for token, kind in zip(ordered, kinds, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": plain,
        "tokenizer.ggml.scores": [rank.get(token, -1e6) for token in ordered],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": ordered.index("<s>"),
        "tokenizer.ggml.eos_token_id": ordered.index("</s>"),
        "tokenizer.ggml.unknown_token_id": ordered.index("<unk>"),
        "tokenizer.ggml.add_space_prefix": False,
    }


@cache
def sentence_piece(prefix: bool = True) -> Any:
    """A SentencePiece BPE model trained as Llama 2's: identity normaliser, split digits, byte fallback."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in CORPUS if line.strip() and "\x00" not in line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gguf_sentence_piece(model: Any, *, prefix: bool = True) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a SentencePiece model."""

    def kind(number: int) -> int:
        if model.is_unknown(number):
            return UNKNOWN
        if model.is_control(number):
            return CONTROL
        if model.is_byte(number):
            return BYTE
        return USER_DEFINED if model.id_to_piece(number) in CONTROLS else NORMAL

    numbers = range(model.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(number) for number in numbers],
        "tokenizer.ggml.scores": [model.get_score(number) for number in numbers],
        "tokenizer.ggml.token_type": [kind(number) for number in numbers],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
