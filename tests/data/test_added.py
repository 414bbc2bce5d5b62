"""Tokens that a run adds: what they become in texts, and what cannot be added."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorimer.data.added import AddedTokens, add_tokens, brought_by, last_id
from lorimer.data.conversation import to_messages
from lorimer.data.template import ChatTemplate
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError, ConfigError
from small_base import CHATML, CONFIG, small_tokenizer_json

ADDED = AddedTokens(("<tool>", "</tool>"), ("<|x|>",))


@pytest.fixture
def plain() -> Tokenizer:
    return Tokenizer(small_tokenizer_json(), CONFIG)


def test_ids_follow_the_last(plain: Tokenizer) -> None:
    made, ids = add_tokens(plain, ADDED)
    assert last_id(plain) == 258
    assert ids == (259, 260, 261)
    assert [made.id(token) for token in ADDED.all] == [259, 260, 261]
    assert [made.is_special(number) for number in ids] == [False, False, True]
    assert made.decode([97, 259, 261, 98]) == plain.decode([97]) + "<tool>" + plain.decode([98])
    assert last_id(made) == 261


@pytest.mark.trap(26)
@pytest.mark.trap(4)
def test_a_text_holds_text_tokens_and_never_special_ones(plain: Tokenizer) -> None:
    """The user's own words are meant wherever they stand; control tokens are the template's, as ever."""
    made, _ = add_tokens(plain, ADDED)
    template = ChatTemplate(CHATML, made)
    text = "a<tool>b</tool><|x|><|im_end|>"
    spelled = plain.encode_content("<|x|><|im_end|>")
    wanted = [*plain.encode("a"), 259, *plain.encode("b"), 260, *spelled]
    assert made.encode_content(text) == wanted
    for role in ("user", "assistant"):
        chat = [{"role": "user", "content": "q"}, {"role": role, "content": text}][role == "user" :]
        ids = list(template.prompt_ids(to_messages(chat)))
        assert any(ids[i : i + len(wanted)] == wanted for i in range(len(ids))), role
        assert 261 not in ids


def test_saved_files_say_which_are_text(plain: Tokenizer) -> None:
    made, _ = add_tokens(plain, ADDED)
    files = {name: content.decode() for name, content in made.files().items()}
    again = Tokenizer(files["tokenizer.json"], json.loads(files["tokenizer_config.json"]))
    assert again.text_tokens == ["<tool>", "</tool>"]
    assert again.encode_content("<tool><|x|>") == made.encode_content("<tool><|x|>")


def test_a_tokenizer_of_transformers_gives_the_same_ids(plain: Tokenizer, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    made, ids = add_tokens(plain, ADDED)
    for name, content in made.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 262
    assert theirs.convert_tokens_to_ids(list(ADDED.all)) == list(ids)
    assert theirs("a<tool>b", add_special_tokens=False)["input_ids"] == made.encode("a<tool>b")


@pytest.mark.parametrize(
    ("text", "special", "words"),
    [
        ([""], [], "holds ''"),
        (["  "], [], "holds '  '"),
        (["<t> "], [], "white space at its ends"),
        (["<t>", "<t>"], [], "named twice"),
        (["<t>"], ["<t>"], "named twice"),
        (["a"], [], r"`a`, which the base has already \(id 64\)"),
        (["<bos>"], [], "which the base has already"),
        (["<tool", "<tool>"], [], "`<tool` is part of `<tool>`"),
        (["x<bos>"], [], "`<bos>` is part of `x<bos>`"),
        ([], ["im_end"], r"add_special_tokens` holds `im_end`: `im_end` is part of `<\|im_end\|>`"),
        (["\ud800"], [], "no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_named(
    plain: Tokenizer, text: list[str], special: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        add_tokens(plain, AddedTokens(tuple(text), tuple(special)))


def test_an_adapter_says_which_it_brings(plain: Tokenizer) -> None:
    made, _ = add_tokens(plain, ADDED)
    assert brought_by(None, {"added_tokens": ADDED.as_json()}, plain) == ADDED
    assert brought_by(made.to_json(), {}, plain) == ADDED
    assert brought_by(made.to_json(), {"added_tokens": {}}, plain) == AddedTokens()
    assert brought_by(plain.to_json(), {}, plain) == AddedTokens()
    assert brought_by("{", {}, plain) == AddedTokens()


@pytest.mark.parametrize("value", [3, {"text": "a"}, {"text": [1]}, {"special": None}])
def test_a_manifest_that_cannot_be_used_is_refused(value: Any) -> None:
    with pytest.raises(AdapterError, match="added_tokens"):
        AddedTokens.of_json(value)
