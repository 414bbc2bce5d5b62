# ruff: noqa: E501  (tables)
"""tokenizer.json and tokenizer_config.json of a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.case import Case, Make, change, gone, put

FILE, CONFIG = "base/tokenizer.json", "base/tokenizer_config.json"
SAVE_AGAIN = "save_pretrained"


def says(what: str, *words: str, **values: Any) -> Case:
    return Case(what, change(FILE, **values), ("tokenizer", *words))


def text(what: str, content: str | bytes, *words: str) -> Case:
    return Case(what, put(FILE, content), ("base/tokenizer.json", *words))


def edited(do: Callable[[dict[str, Any]], Any]) -> Make:
    def make(folder: Path) -> None:
        whole = json.loads((folder / FILE).read_text())
        do(whole)
        (folder / FILE).write_text(json.dumps(whole))

    return make


def huge(folder: Path) -> None:
    with (folder / FILE).open("wb") as file:
        file.truncate(10**12)


CASES = [
    # the file
    Case("there is none", gone(FILE), ("base: tokenizer.json is missing", SAVE_AGAIN)),
    Case("a terabyte", huge, ("tokenizer.json: 1,000,000,000,000 bytes is too large", "Copy")),
    text("an empty file", "", "cannot be read", SAVE_AGAIN),
    text("half of it", '{"version": "1.0", "model": {', "cannot be read", SAVE_AGAIN),
    text("a list", "[]", "cannot be read", SAVE_AGAIN),
    text("UTF-16", '{"version": "1.0"}'.encode("utf-16"), "cannot be read", "Copy"),
    text("a SentencePiece file", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\xff\xfe", "cannot be read", "Copy"),
    text("brackets without end", '{"model": ' + "[" * 100_000, "cannot be read", SAVE_AGAIN),
    # the model in it
    says("no model", "cannot be read", SAVE_AGAIN, model=...),
    says("a model that is not known", "cannot be read", SAVE_AGAIN, model__type="Magic"),
    says("no vocabulary", "cannot be read", SAVE_AGAIN, model__vocab=...),
    says("a vocabulary that is text", "cannot be read", SAVE_AGAIN, model__vocab="abc"),
    says("an id that is text", "cannot be read", SAVE_AGAIN, model__vocab={"a": "0"}),
    says("an id that is negative", "cannot be read", SAVE_AGAIN, model__vocab={"a": -1}),
    says("an id beyond 32 bits", "cannot be read", SAVE_AGAIN, model__vocab={"a": 2**40}),
    says("merges of tokens that are not there", "cannot be read", SAVE_AGAIN, model__merges=["never seen"]),
    says("merges of three parts", "cannot be read", SAVE_AGAIN, model__merges=[["a", "b", "c"]]),
    # what is around it
    says("a normalizer that is not known", "cannot be read", SAVE_AGAIN, normalizer={"type": "Shuffle"}),
    says("a pattern that is none", "cannot be read", SAVE_AGAIN,
         pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    says("a decoder that is a number", "cannot be read", SAVE_AGAIN, decoder=5),
    says("normalizers within each other, 400 deep", "cannot be read", SAVE_AGAIN,
         normalizer=json.loads('{"type":"Sequence","normalizers":[' * 400 + '{"type":"NFC"}' + "]}" * 400)),
    says("a cut table that is no base64", "cannot be read", SAVE_AGAIN, normalizer={"type": "Precompiled", "precompiled_charsmap": "%%%"}),
    # added tokens
    Case("an added token without a text", edited(lambda whole: whole["added_tokens"][0].pop("content")), ("tokenizer", "cannot be read", SAVE_AGAIN)),
    Case("added tokens that are an object", edited(lambda whole: whole.update(added_tokens={})), ("tokenizer", "cannot be read", SAVE_AGAIN)),
    Case("letters beyond the embedding", edited(lambda whole: whole["model"]["vocab"].update(a=300, b=301)),
         ("train.jsonl:1: the tokenizer gives the id 301, and the embedding has 259 rows", "tokens added")),
    # tokenizer_config.json
    Case("settings that are a list", put(CONFIG, "[]"), ("tokenizer_config.json: this should be a JSON object", "Copy")),
    Case("settings that are cut off", put(CONFIG, '{"eos_token": '), ("tokenizer_config.json: this is not JSON", "Copy")),
    Case("an end of turn that is a number", put(CONFIG, '{"eos_token": 2}'), ("tokenizer_config.json: `eos_token` is 2 (wanted: a text)", "Copy")),
    Case("an end of turn without its text", put(CONFIG, '{"eos_token": {"lstrip": false}}'), ("tokenizer_config.json: `eos_token` is", "(wanted: a text)")),
    Case("a begin that is a list", put("base/special_tokens_map.json", '{"bos_token": ["a"]}'), ("special_tokens_map.json: `bos_token` is", "(wanted: a text)")),
    Case("a word for true or false", put(CONFIG, '{"add_bos_token": "false"}'), ("tokenizer_config.json: `add_bos_token` is", "(wanted: true or false)")),
    Case("half of an emoji in a token", put(CONFIG, '{"eos_token": "\\ud800"}'), ("tokenizer_config.json: this is not JSON", "Copy")),
]  # fmt: skip
