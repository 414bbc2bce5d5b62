"""Ids equal to the reference's, and control tokens that no text can spell."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from data.hard_strings import (
    CONFIG,
    CONTROLS,
    HARD,
    KINDS,
    NUMERIC,
    PLAIN,
    SPELLED,
    WORDS,
    byte_level,
    cut_as,
    gemma,
    gguf_byte_level,
    gguf_sentence_piece,
    llama3_like,
    prepend,
    sentence_piece,
    vocabulary_of,
)
from gguf_files import write_vocabulary
from lorimer.bases.open import open_base
from lorimer.data.cuts import CUTS
from lorimer.data.tokenizer import Piece, Tokenizer
from lorimer.data.vocabulary import NORMAL
from lorimer.errors import BaseError

FIXTURE = Path(__file__).parent / "fixtures" / "smollm2_ids.json"


def of(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind](), CONFIG)


def reference(text: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(text)


def ids_of(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def control_ids(tokenizer: Tokenizer) -> set[int | None]:
    return {tokenizer.id(token) for token in (*CONTROLS, *WORDS)} - {None}


# The reference's ids.


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_reference(kind: str) -> None:
    tokenizer, backend = of(kind), reference(KINDS[kind]())
    for text in HARD:
        assert tokenizer.encode(text) == ids_of(backend, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(KINDS[kind](), encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **CONFIG)
    tokenizer = of(kind)
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        wanted = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == wanted == saved.encode(text, add_special_tokens=False), text
    assert (saved.bos_token_id, saved.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert saved.encode("a")[:1] == (
        [tokenizer.bos_id] if tokenizer.adds_bos else tokenizer.encode("a")[:1]
    )


def test_smollm2_from_gguf_gives_the_ids_of_transformers(smollm2: Path) -> None:
    """The fixture is written by fixtures/make_smollm2_ids.py."""
    tokenizer = Tokenizer.from_base(open_base(smollm2))
    wanted = json.loads(FIXTURE.read_text(encoding="utf-8"))
    assert [row["text"] for row in wanted] == HARD
    for row in wanted:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special=False) == row["text"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_from_gguf_gives_its_own_ids(prefix: bool) -> None:
    model = sentence_piece(prefix)
    tokenizer = Tokenizer.from_gguf(gguf_sentence_piece(model, prefix=prefix))
    for text in PLAIN + NUMERIC:
        assert tokenizer.encode(text) == model.encode(text), text
    # Content is plain to SentencePiece too; only its user-defined symbols it takes from any text.
    for text in SPELLED:
        if not any(symbol in text for symbol in ("<|im_start|>", "<|im_end|>")):
            assert tokenizer.encode_content(text) == model.encode(text), text


def test_sentencepiece_puts_a_space_after_a_control_token_as_llama_cpp_does() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_sentence_piece(sentence_piece()))
    after = tokenizer.encode("</s>the")
    assert after == [tokenizer.id("</s>"), *tokenizer.encode("the")]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a 2024x I'LL\n\n b", ["a", "Ġ2024", "x", "ĠI", "'", "LL", "ĊĊ", "Ġb"]),
        ("smollm", "a 2024x", ["a", "Ġ", "2", "0", "2", "4", "x"]),
        ("smollm", "½٣", ["Â½", "Ù£"]),
        ("olmo", "e\u0301 2024", ["Ã©", "Ġ2024"]),
        ("command-r", "e\u0301 24", ["Ã©", "Ġ", "2", "4"]),
        ("refact", "a 24", ["a", "Ġ", "2", "4"]),
        ("stablelm2", "e\u0301'S 24", ["Ã©", "'S", "Ġ", "2", "4"]),
        ("deepseek-r1-qwen", "e\u0301", ["e", "Ìģ"]),
        ("dbrx", "x2024'LL \n b", ["x", "202", "4", "'LL", "ĠĊ", "Ġb"]),
        ("tekken", "camelCase24 HTMLx/\n don't", ["camel", "Case", "2", "4", "ĠHTMLx", "/Ċ", "Ġdon", "'t"]),
        ("gpt-4o", "camelCase2024 I'LL don't", ["camel", "Case", "202", "4", "ĠI'LL", "Ġdon't"]),
        ("falcon", "a,b 12345 x== y", ["a", ",", "b", "Ġ", "123", "45", "Ġx", "==", "Ġy"]),
        ("default", "a,b 12345 x== y", ["a", ",", "b", "Ġ", "123", "45", "Ġx", "==", "Ġy"]),
        ("deepseek-llm", "The 2024年! é", ["The", "Ġ", "2", "0", "2", "4", "å¹´", "!", "ĠÃ©"]),
        ("deepseek-coder", "The 20+!\n日本", ["The", "Ġ", "2", "0", "+", "!", "Ċ", "æĹ¥æľ¬"]),
        ("deepseek-v3", ".foo 2024年a!!\n", [".foo", "Ġ", "202", "4", "å¹´", "a", "!!Ċ"]),
        ("llama-bpe", "a 2024x I'LL\n\n b", ["a", "Ġ", "202", "4", "x", "ĠI", "'LL", "ĊĊ", "Ġb"]),
        ("qwen2", "a 2024x", ["a", "Ġ", "2", "0", "2", "4", "x"]),
    ],
)
def test_each_name_of_a_splitting_cuts_as_its_models_do(pre: str, text: str, pieces: list[str]) -> None:
    backend = reference(Tokenizer.from_gguf(gguf_byte_level(pre)).to_json())
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("pre", CUTS)
def test_every_known_splitting_loads_and_keeps_the_text(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_byte_level(pre))
    for text in PLAIN:
        if not CUTS[pre].composes:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def random_texts(count: int) -> list[str]:
    """Letters of many scripts, digits, signs and spaces in any order."""
    rng = random.Random(9)
    letters = [
        *"aAbZ zé1 2٣½²½\n\t\r.,'!?-_$+^`|~{}",
        "'s",
        "'LL",
        "  ",
        "\r\n",
        "日本",
        "ـم",
        "ἕ",
        "ß",
        "Ǆ",
        "e\u0301",
    ]
    return ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("pre", CUTS)
def test_a_vocabulary_written_as_a_gguf_file_gives_the_ids_it_had(pre: str, tmp_path: Path) -> None:
    """By the gguf package's writer, in the form of llama.cpp's converter."""
    base = open_base(write_vocabulary(tmp_path / "v.gguf", gguf_byte_level(pre, cut_as(pre))))
    tokenizer, backend = Tokenizer.from_base(base), reference(cut_as(pre))
    for text in HARD + random_texts(100):
        assert tokenizer.encode(text) == ids_of(backend, text), text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.pre": "whatever"}, "`whatever`"),
        ({"tokenizer.ggml.pre": None}, "does not say how it cuts text"),
        ({"tokenizer.ggml.model": "rwkv"}, "`rwkv`"),
        ({"tokenizer.ggml.model": "t5"}, r"`t5` \(SentencePiece unigram\) is not supported"),
        ({"tokenizer.ggml.model": "bert"}, r"`bert` \(WordPiece\) is not supported"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.merges": ["nothing-to-join"]}, "cannot be read"),
        ({"tokenizer.ggml.merges": ["qqqqq zzzzz"]}, "cannot be read"),
        ({"tokenizer.ggml.token_type": [1]}, "damaged"),
        ({"tokenizer.ggml.scores": [1.0]}, "damaged"),
        ({"tokenizer.ggml.tokens": ["a"] * 504}, "damaged"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(BaseError, match=named):
        Tokenizer.from_gguf(gguf_byte_level() | change)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {}}', "not json"])
def test_a_damaged_tokenizer_json_is_an_error_of_the_base(text: str) -> None:
    with pytest.raises(BaseError, match="tokenizer cannot be read"):
        Tokenizer(text, {})


@pytest.mark.parametrize("number", [-1, 10**6, "1", None])
def test_a_role_with_an_id_outside_the_vocabulary_is_no_token(number: Any) -> None:
    metadata = gguf_byte_level() | {"tokenizer.ggml.bos_token_id": number}
    assert Tokenizer.from_gguf(metadata).bos_id is None


@pytest.mark.parametrize(
    ("metadata", "adds"),
    [
        (gguf_byte_level("gpt-2"), False),
        (gguf_byte_level("gpt-2") | {"tokenizer.ggml.add_bos_token": True}, True),
        ({k: v for k, v in gguf_byte_level("llama-bpe").items() if "add_bos" not in k}, True),
        ({k: v for k, v in gguf_byte_level("smollm").items() if "add_bos" not in k}, False),
        ({k: v for k, v in gguf_byte_level("tekken").items() if "add_bos" not in k}, True),
        (gguf_sentence_piece(sentence_piece()), True),
        (gguf_sentence_piece(sentence_piece()) | {"tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_a_vocabulary_from_gguf_adds_bos_here_and_where_it_is_saved(
    metadata: dict[str, Any], adds: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_gguf(metadata)
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    begin = [tokenizer.bos_id] if adds else []
    assert tokenizer.adds_bos is adds
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a") == begin + tokenizer.encode("a")


def test_a_vocabulary_from_gguf_adds_eos_where_it_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_gguf(gguf_byte_level("gpt-2") | {"tokenizer.ggml.add_eos_token": True})
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a") == [*tokenizer.encode("a"), tokenizer.eos_id]


def test_a_file_older_than_the_names_is_cut_as_its_architecture_was() -> None:
    unnamed = gguf_byte_level("olmo") | {"tokenizer.ggml.pre": None, "general.architecture": "gptneox"}
    named = Tokenizer.from_gguf(gguf_byte_level("olmo"))
    assert Tokenizer.from_gguf(unnamed).to_json() == named.to_json()
    with pytest.raises(BaseError, match="does not say how it cuts text"):
        Tokenizer.from_gguf(unnamed | {"general.architecture": "llama"})


def test_a_sentencepiece_file_without_roles_has_those_of_llama() -> None:
    metadata = gguf_sentence_piece(sentence_piece())
    bare = {key: value for key, value in metadata.items() if not key.endswith("_token_id")}
    tokenizer = Tokenizer.from_gguf(bare)
    assert (tokenizer.token_text("unk"), tokenizer.bos_id, tokenizer.eos_id) == ("<unk>", 1, 2)


def test_runs_of_spaces_among_the_users_tokens_are_found_in_the_text() -> None:
    """llama.cpp keeps Gemma's as spaces, and takes the longest."""
    metadata = vocabulary_of(gemma())
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer, backend = Tokenizer.from_gguf(metadata), reference(gemma())
    spaces, lines = tokens.index(" " * 8), tokens.index("\n\n")
    assert tokenizer.encode("a" + " " * 8 + "\n\n") == [tokens.index("a"), spaces, lines]
    assert spaces == backend.token_to_id("▁" * 8)
    assert not tokenizer.is_special(spaces)
    assert tokenizer.decode([spaces, lines]) == " " * 8 + "\n\n"


def test_phi_3s_markers_take_the_spaces_behind_them() -> None:
    metadata = gguf_sentence_piece(sentence_piece())
    plain, phi = (Tokenizer.from_gguf(metadata | {"general.architecture": a}) for a in ("llama", "phi3"))
    assert phi.encode("<|im_end|>  a") == phi.encode("<|im_end|>a") != plain.encode("<|im_end|>  a")
    assert phi.encode("<s> a") == plain.encode("<s> a")


def test_merges_of_a_sentencepiece_vocabulary_may_be_given() -> None:
    """Gemma 4's kind: the merges of a tokenizer.json in place of scores."""
    given = vocabulary_of(gemma()) | {"tokenizer.ggml.model": "gemma4"}
    given["tokenizer.ggml.merges"] = [" ".join(pair) for pair in json.loads(gemma())["model"]["merges"]]
    for number, token in enumerate(given["tokenizer.ggml.tokens"]):
        if token.isspace():  # its runs of spaces are ordinary tokens
            given["tokenizer.ggml.tokens"][number] = token.replace(" ", "▁")
            given["tokenizer.ggml.token_type"][number] = NORMAL
    tokenizer, backend = Tokenizer.from_gguf(given), reference(gemma())
    for text in PLAIN:
        assert tokenizer.encode(text) == ids_of(backend, text), text


# Control tokens.


@pytest.mark.trap(26)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_never_becomes_a_control_token(kind: str) -> None:
    tokenizer = of(kind)
    rng = random.Random(0)
    pieces = [*CONTROLS, *WORDS, " ", "a", "\n", "<", "|>", "<|im_", "end|>", "</", "é", "👩‍👩‍👧‍👦"]
    made = ["".join(rng.choices(pieces, k=8)) for _ in range(300)]
    for text in HARD + made:
        hidden = tokenizer.encode_pieces([Piece(tokenizer.hide(text), 0)])[0]
        assert not control_ids(tokenizer) & set(hidden), text
        assert hidden == tokenizer.encode_content(text)
        assert tokenizer.show(tokenizer.hide(text)) == text


@pytest.mark.trap(26)
@pytest.mark.parametrize("kind", ["byte level", "llama 3"])
def test_a_spelled_control_token_reads_back_as_it_was_written(kind: str) -> None:
    tokenizer = of(kind)
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode_content(text)) == text


def test_a_text_without_markers_has_the_ids_of_the_reference_as_content() -> None:
    for kind, make in KINDS.items():
        backend, tokenizer = reference(make()), of(kind)
        for text in PLAIN:
            assert tokenizer.encode_content(text) == ids_of(backend, text), (kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_templates_own_markers_are_the_references(kind: str) -> None:
    """Stripping around markers, prefix spaces and normalisers included."""
    tokenizer, backend = of(kind), reference(KINDS[kind]())
    for text in HARD:
        assert tokenizer.encode_pieces([Piece(text, 0)])[0] == ids_of(backend, text), text


def test_the_longest_marker_at_the_leftmost_place_wins() -> None:
    backend = reference(byte_level())
    backend.add_special_tokens(["<|im_end|>x", "<|im"])
    tokenizer = Tokenizer(backend.to_str(), CONFIG)
    text = "<|im_end|>x<|im_end|><|im_"
    assert tokenizer.encode_pieces([Piece(text, 0)])[0] == ids_of(backend, text)
    assert [tokenizer.token(number) for number in tokenizer.encode(text)][:2] == [
        "<|im_end|>x",
        "<|im_end|>",
    ]


def test_an_assistant_may_write_words_that_are_no_control_tokens() -> None:
    tokenizer = of("byte level")
    text = "<think>a</think><|im_end|>"
    own = tokenizer.encode_pieces([Piece(tokenizer.hide(text, own_words=True), 0)])[0]
    assert [tokenizer.token(number) for number in own[:3]] == ["<think>", "a", "</think>"]
    assert tokenizer.id("<|im_end|>") not in own


@pytest.mark.parametrize("old_form", [False, True])
def test_an_added_token_that_is_also_a_word_of_the_vocabulary(old_form: bool) -> None:
    described = json.loads(byte_level())
    word = next("".join(pair) for pair in described["model"]["merges"] if "".join(pair).isalpha())
    backend = reference(byte_level())
    backend.add_tokens([word])
    described = json.loads(backend.to_str())
    if old_form:
        described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    tokenizer = Tokenizer(json.dumps(described), CONFIG)
    assert tokenizer.encode(word) == [tokenizer.id(word)]
    assert tokenizer.id(word) not in tokenizer.encode_content(f"{word} {word}s")
    assert tokenizer.decode(tokenizer.encode_content(f"{word} {word}s")) == f"{word} {word}s"


def test_byte_fallback_works_where_bytes_are_listed_as_added_tokens() -> None:
    backend = reference(prepend())
    backend.add_special_tokens([f"<0x{number:02X}>" for number in range(256)])
    tokenizer = Tokenizer(backend.to_str(), CONFIG)
    text = "٣ €\u0378"
    assert tokenizer.encode_content(text) == ids_of(backend, text)
    assert tokenizer.id("<unk>") not in tokenizer.encode_content(text)


# Pieces.


@pytest.mark.trap(6)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_before_a_cut_do_not_depend_on_what_follows(kind: str) -> None:
    tokenizer = of(kind)
    for prompt in [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "[INST] hi [/INST]",
        "q: ",
        "x",
    ]:
        alone = tokenizer.encode_pieces([Piece(prompt, 0), Piece("", 0)])[0]
        for answer in HARD:
            text = tokenizer.hide(answer)
            ids, trained = tokenizer.encode_pieces(
                [Piece(prompt, 0), Piece(text + "</s>\n", len(text) + 4)]
            )
            assert ids[: len(alone)] == alone
            assert not any(trained[: len(alone)])
            end = len(ids) - ids[::-1].index(tokenizer.eos_id)
            assert all(trained[len(alone) : end])
            assert not any(trained[end:])


@pytest.mark.trap(6)
@pytest.mark.parametrize(
    "kind", ["byte level", "llama 3", "prepend", "metaspace first", "metaspace always"]
)
def test_the_trained_ids_read_as_the_answer(kind: str) -> None:
    """5,000 random seams, for the decoders that give every text back."""
    tokenizer = of(kind)
    rng = random.Random(6)
    letters = [*"ab 1\n\t.,'{}\"", "  ", "é", "日本", "👍🏽", "\r\n", "the", " the", "assistant"]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for _ in range(1000):
        answer = "".join(rng.choices(letters, k=rng.randrange(9)))
        ids, trained = tokenizer.encode_pieces([Piece(prompt, 0), Piece(answer + "</s>", len(answer) + 4)])
        learnt = [number for number, flag in zip(ids, trained, strict=True) if flag]
        # A leading id keeps a decoder from taking the answer's first space for the dummy one.
        lead = tokenizer.encode("x")
        assert tokenizer.decode(lead + learnt) == tokenizer.decode(lead) + answer
        assert learnt[-1] == tokenizer.eos_id


def test_only_the_first_piece_is_a_beginning() -> None:
    for kind in ("prepend", "metaspace first", "metaspace always", "byte level with a prefix space"):
        tokenizer = of(kind)
        first = tokenizer.encode_pieces([Piece("the", 0)])[0]
        second = tokenizer.encode_pieces([Piece("the", 0), Piece("the", 3)])[0][len(first) :]
        assert tokenizer.token(first[0])[0] in "▁Ġ", kind
        assert tokenizer.token(second[0])[0] not in "▁Ġ", kind


# Decoding.


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_shows_whole_characters_and_in_the_end_everything(kind: str) -> None:
    tokenizer = of(kind)
    for text in HARD:
        ids = tokenizer.encode(text)
        stream, shown = tokenizer.stream(), ""
        for number in ids:
            shown += stream.push(number)
            if "\ufffd" not in text:
                assert "\ufffd" not in shown
        assert shown + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_ids_shows_what_decoding_all_of_them_shows(kind: str) -> None:
    tokenizer, rng = of(kind), random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(12)]
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_shows_each_word_as_it_comes() -> None:
    tokenizer = of("byte level")
    stream = tokenizer.stream()
    ids = tokenizer.encode("turn the living room lights on")
    assert all(stream.push(number) for number in ids)
    assert stream.finish() == ""


def test_decoding_leaves_out_control_tokens_but_no_words() -> None:
    tokenizer = of("byte level")
    ids = tokenizer.encode("<s>a<think>b<|im_end|>")
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special=False) == "<s>a<think>b<|im_end|>"
    assert [tokenizer.is_special(number) for number in ids] == [True, False, False, False, True]


# What a saved tokenizer says beside its vocabulary.


@pytest.mark.trap(34)
@pytest.mark.parametrize("length", [512, 1, 10**30, 1e30])
def test_no_length_in_the_files_cuts_a_text(length: float) -> None:
    backend = reference(byte_level())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend.to_str(), CONFIG | {"model_max_length": length})
    text = "some words " * 400
    assert tokenizer.encode(text) == ids_of(reference(byte_level()), text)
    assert tokenizer.decode(tokenizer.encode_content(text)) == text
    saved = json.loads(tokenizer.to_json())
    assert saved["truncation"] is None
    assert saved["padding"] is None
    assert b"model_max_length" not in tokenizer.files()["tokenizer_config.json"]


@pytest.mark.parametrize(
    ("text", "config", "adds"),
    [
        (byte_level(), CONFIG, False),
        (llama3_like(), CONFIG, True),
        (byte_level(), CONFIG | {"add_bos_token": True}, True),
        (llama3_like(), CONFIG | {"add_bos_token": False}, False),
        (llama3_like(), {"eos_token": "</s>"}, False),
    ],
)
def test_bos_is_added_where_the_files_say_so(text: str, config: dict[str, Any], adds: bool) -> None:
    assert Tokenizer(text, config).adds_bos is adds


def test_roles_are_read_from_texts_and_from_objects() -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    tokenizer = Tokenizer(byte_level(), config)
    assert tokenizer.bos_id == tokenizer.id("<s>")
    assert tokenizer.eos_ids == [tokenizer.id("</s>")]
    assert tokenizer.pad_id is None
    assert tokenizer.token(tokenizer.id("<s>")) == "<s>"
    assert tokenizer.id("no such token") is None


def test_a_base_without_a_tokenizer_says_how_to_save_one(tmp_path: Path) -> None:
    class Empty:
        tokenizer_json = None
        gguf_metadata = None
        path = tmp_path

    with pytest.raises(BaseError, match=r"tokenizer.json is missing") as caught:
        Tokenizer.from_base(Empty())  # type: ignore[arg-type]
    assert "save_pretrained" in (caught.value.fix or "")


def test_two_processes_hide_control_tokens_under_different_names() -> None:
    assert of("byte level").hide("<s>") != of("byte level").hide("<s>")


@pytest.mark.filterwarnings("ignore")
def test_smollm2_live_against_transformers(smollm2: Path) -> None:
    """One text of the fixture, from the file itself."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_base(open_base(smollm2))
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in PLAIN[:20]:
        if not any(map(str.isdigit, text)):
            assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
