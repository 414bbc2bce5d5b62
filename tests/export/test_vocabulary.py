"""A tokenizer.json as GGUF metadata: the same ids on hard strings, or a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.hard_strings import (
    CONFIG,
    HARD,
    KINDS,
    NUMERIC,
    PLAIN,
    SPELLED,
    byte_level,
    cut_as,
    gguf_byte_level,
    gguf_sentence_piece,
    sentence_piece,
)
from lorimer.data.cuts import CUTS
from lorimer.data.tokenizer import Tokenizer
from lorimer.data.vocabulary import UNUSED, tokenizer_json
from lorimer.errors import BaseError
from lorimer.export import vocabulary
from lorimer.export.vocabulary import end_of_turn, space_note, vocabulary_entries


def again(tokenizer: Tokenizer, rows: int | None = None) -> tuple[Tokenizer, dict[str, Any]]:
    made = vocabulary_entries(tokenizer, rows or tokenizer.vocab_size)
    return Tokenizer.from_gguf(made), made


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_vocabularies_give_the_same_ids(name: str) -> None:
    before = Tokenizer(tokenizer_json(gguf_byte_level(name, cut_as(name))), CONFIG)
    after, made = again(before)
    found = CUTS[made["tokenizer.ggml.pre"]]
    assert found.steps == CUTS[name].steps
    assert (found.composes, found.whole_words) == (CUTS[name].composes, CUTS[name].whole_words)
    for line in HARD:
        assert after.encode(line) == before.encode(line), line
        assert after.encode_content(line) == before.encode_content(line), line
    assert (after.bos_id, after.eos_id, after.adds_bos) == (before.bos_id, before.eos_id, before.adds_bos)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_its_own_ids(prefix: bool) -> None:
    model = sentence_piece(prefix)
    metadata = gguf_sentence_piece(model, prefix=prefix)
    before = Tokenizer.from_gguf(metadata)
    after, made = again(before)
    assert made["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]
    assert made["tokenizer.ggml.token_type"] == metadata["tokenizer.ggml.token_type"]
    assert made["tokenizer.ggml.add_space_prefix"] is prefix
    for line in PLAIN + NUMERIC:
        assert after.encode(line) == model.encode(line), line
    for line in SPELLED:
        assert after.encode(line) == before.encode(line), line


@pytest.mark.parametrize(
    "kind", ["byte level", "llama 3", "prepend", "metaspace first", "metaspace never", "gemma"]
)
def test_a_tokenizer_json_gives_the_same_ids_or_is_refused(kind: str) -> None:
    before = Tokenizer(KINDS[kind](), CONFIG)
    after, made = again(before)
    for line in PLAIN + NUMERIC:
        if kind == "gemma" and "▁" in line:
            continue  # llama.cpp looks for runs of spaces alone
        if kind != "metaspace first" or not line.startswith((" ", "▁")):
            assert after.encode_content(line) == before.encode_content(line), line
    for role in ("bos", "eos", "unk"):
        assert after.token_text(role) == before.token_text(role)
    assert made["tokenizer.ggml.add_bos_token"] is (kind == "llama 3")


@pytest.mark.parametrize(
    ("kind", "differs"),
    [("byte level", False), ("prepend", False), ("metaspace first", True), ("metaspace never", False)],
)
def test_a_space_that_llama_cpp_adds_is_said(kind: str, differs: bool) -> None:
    before = Tokenizer(KINDS[kind](), CONFIG)
    after, made = again(before)
    note = space_note(before, made)
    assert (note is not None) is differs
    texts = [" a", "</s>a", "</s> a"]
    assert differs is ([after.encode(text) for text in texts] != [before.encode(text) for text in texts])


def test_rows_without_a_token_are_named_and_unused() -> None:
    before = Tokenizer(byte_level(), CONFIG)
    after, made = again(before, before.vocab_size + 3)
    assert made["tokenizer.ggml.tokens"][-1] == f"[PAD{before.vocab_size + 2}]"
    assert made["tokenizer.ggml.token_type"][-3:] == [UNUSED] * 3
    for line in [*HARD, f"[PAD{before.vocab_size}]"]:
        assert after.encode(line) == before.encode(line), line


def changed(text: str, **model: Any) -> Tokenizer:
    described = json.loads(text)
    described["model"] |= model
    return Tokenizer(json.dumps(described), CONFIG)


def with_steps(**steps: Any) -> Tokenizer:
    return Tokenizer(json.dumps(json.loads(byte_level()) | steps), CONFIG)


LOWER = {"type": "Lowercase"}
REFUSED = {
    "a prefix space": (lambda: Tokenizer(KINDS["byte level with a prefix space"](), CONFIG), "no name for"),
    "whole words first": (lambda: changed(byte_level(), ignore_merges=True), "no name for how it cuts"),
    "lower case": (lambda: with_steps(normalizer=LOWER), "no name for how it cuts text"),
    "lower case before SentencePiece": (
        lambda: Tokenizer(
            json.dumps(json.loads(KINDS["metaspace never"]()) | {"normalizer": LOWER}), CONFIG
        ),
        "no Lowercase before its SentencePiece",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_has_no_form_for_is_refused(what: str) -> None:
    make, words = REFUSED[what]
    tokenizer = make()
    with pytest.raises(BaseError, match=words) as caught:
        vocabulary_entries(tokenizer, tokenizer.vocab_size)
    assert "--to merged" in str(caught.value)


def test_more_ids_than_rows_are_refused() -> None:
    tokenizer = Tokenizer(byte_level(), CONFIG)
    with pytest.raises(BaseError, match=r"the model 300 rows for them"):
        vocabulary_entries(tokenizer, 300)


def test_ids_that_would_change_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges in another order would give other ids; nothing but reading back shows it."""
    before = Tokenizer(KINDS["metaspace never"](), CONFIG)
    turned = {"side_effect": vocabulary._scores}
    monkeypatch.setattr(
        vocabulary, "_scores", lambda model, tokens: [-s for s in turned["side_effect"](model, tokens)]
    )
    with pytest.raises(BaseError, match="would become other ids"):
        vocabulary_entries(before, before.vocab_size)


def test_the_end_of_a_turn_is_named_where_it_is_not_the_end_of_text() -> None:
    tokenizer = Tokenizer(byte_level(), CONFIG)
    turn, text = tokenizer.id("<|im_end|>"), tokenizer.eos_id
    assert turn is not None
    assert text is not None
    assert end_of_turn(tokenizer, [turn, text]) == {"tokenizer.ggml.eot_token_id": turn}
    assert end_of_turn(tokenizer, [text]) == {}
