"""Answers against transformers' generate, and batches against single prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorimer.errors import UserError
from lorimer.generate import engine
from lorimer.generate.engine import generate_ids
from lorimer.generate.model import Model, load
from lorimer.generate.sampling import Sampling
from lorimer.kernels.native import library
from lorimer.model.decoder import Decoder
from model_cases import CASES
from tiny import FAMILIES, Tiny, make_tiny, our_logits, random_rows

PROMPTS = random_rows((5, 1, 17, 9, 9, 30), seed=4)
GREEDY, WARM = Sampling(), Sampling(temperature=1.5, top_p=0.95, seed=11)
EOS = [2]
MIXTURES = ("mixtral", "qwen3_moe")
ON_TAPE = tuple(family for family in FAMILIES if family not in MIXTURES)  # whose step is kernels alone
HALF_TURNS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# Heads of 16, which the native attention takes, where these are no setting of their own.
WIDE: dict[str, dict[str, Any]] = {
    **{family: {"hidden_size": 96} for family in ("falcon", "cohere", "starcoder2")},
    **{family: {"hidden_size": 96, "rope_parameters": HALF_TURNS} for family in ("stablelm", "gpt_neox")},
    "gpt2": {"hidden_size": 96, "n_embd": 96},
    "opt": {"hidden_size": 96, "word_embed_proj_dim": 96},
}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}}


def answers(
    decoder: Decoder, prompts: Any = PROMPTS, sampling: Sampling = GREEDY, **named: Any
) -> list[Any]:
    settings = {"max_new_tokens": 20, "eos_ids": EOS} | named
    return generate_ids(decoder, prompts, sampling=sampling, **settings)


def ids(found: list[Any]) -> list[list[int]]:
    return [answer.tokens for answer in found]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_transformers(name: str, penalty: float, tmp_path: Path) -> None:
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path, family, **changes)
    found = answers(tiny.decoder, sampling=Sampling(repetition_penalty=penalty))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        theirs = tiny.hf.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        if name == "llama longrope" and len(prompt) <= 16 < len(prompt) + len(theirs):
            continue  # there transformers goes on with keys that were turned for a short row
        ended = "eos" if theirs[-1] in EOS else "length"
        assert answer.tokens == [token for token in theirs if token not in EOS]
        assert answer.ended == ended


@pytest.mark.parametrize("family", ON_TAPE)
def test_the_next_token_runs_from_a_tape(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the answers that there are without tapes."""
    changes = {"head_dim": 16} | BIASES.get(family, {}) | WIDE.get(family, {})
    decoder = make_tiny(tmp_path, family, **changes).decoder
    with_tape = ids(answers(decoder))
    replayed = []
    run = library.run_tape
    monkeypatch.setattr(library, "run_tape", lambda slots: (replayed.append(1), run(slots)))
    assert ids(answers(decoder)) == with_tape
    assert bool(replayed) == library.tapes()
    monkeypatch.setattr(library, "tapes", lambda: False)
    assert ids(answers(decoder)) == with_tape


@pytest.mark.trap(58)
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_gives_what_each_prompt_gives_alone(name: str, sampling: Sampling, tmp_path: Path) -> None:
    family, changes = CASES[name]
    decoder = make_tiny(tmp_path, family, **changes).decoder
    alone = [ids(answers(decoder, [prompt], sampling))[0] for prompt in PROMPTS]
    assert ids(answers(decoder, PROMPTS, sampling)) == alone
    assert ids(answers(decoder, PROMPTS, sampling, batch_size=2)) == alone
    backwards = ids(answers(decoder, PROMPTS[::-1], sampling))
    assert backwards[::-1] == alone


@pytest.mark.trap(58)
def test_prompts_computed_in_parts_give_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ids(answers(tiny.decoder))
    monkeypatch.setattr(engine, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(engine, "CACHE_STEP", 3)
    assert ids(answers(tiny.decoder)) == whole


def test_seeds(tiny: Tiny) -> None:
    first = ids(answers(tiny.decoder, sampling=WARM))
    assert ids(answers(tiny.decoder, sampling=WARM)) == first
    other = ids(answers(tiny.decoder, sampling=Sampling(temperature=1.5, top_p=0.95, seed=12)))
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))


def test_equal_prompts_of_one_call_get_draws_of_their_own(tiny: Tiny) -> None:
    found = ids(answers(tiny.decoder, [PROMPTS[0]] * 4, WARM))
    assert len({tuple(tokens) for tokens in found}) == 4
    assert found[0] == ids(answers(tiny.decoder, [PROMPTS[0]], WARM))[0]


def test_greedy_is_the_most_likely_token_of_the_whole_row(tiny: Tiny) -> None:
    for prompt, tokens in zip(PROMPTS, ids(answers(tiny.decoder)), strict=True):
        logits = our_logits(tiny.decoder, [prompt + tokens])[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens


@pytest.mark.parametrize("most", [1, 2, 7])
def test_most_tokens(tiny: Tiny, most: int) -> None:
    found = answers(tiny.decoder, max_new_tokens=most, eos_ids=[])
    assert [len(answer.tokens) for answer in found] == [most] * len(PROMPTS)
    assert {answer.ended for answer in found} == {"length"}


def test_the_end_token_ends_and_is_not_part_of_the_answer(tiny: Tiny) -> None:
    free = ids(answers(tiny.decoder, eos_ids=[]))
    end = free[0][4]
    for answer, tokens in zip(answers(tiny.decoder, eos_ids=[end]), free, strict=True):
        wanted = tokens[: tokens.index(end)] if end in tokens else tokens
        assert answer.tokens == wanted
        assert answer.ended == ("eos" if end in tokens else "length")


def test_finished_rows_leave(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one row stop at their second token; from then on one row is computed."""
    free = ids(answers(tiny.decoder, eos_ids=[]))
    firsts = {tokens[0] for tokens in free[1:]}
    assert free[0][0] not in firsts
    sizes = []
    original = Decoder.next_hidden

    def counted(self: Decoder, ids_B: torch.Tensor, cache: Any) -> torch.Tensor:
        sizes.append(len(ids_B))
        return original(self, ids_B, cache)

    monkeypatch.setattr(Decoder, "next_hidden", counted)
    found = answers(tiny.decoder, eos_ids=[], stop=lambda tokens: tokens[0] in firsts and len(tokens) == 2)
    assert sizes == [6, *[1] * 18]
    assert found[0].tokens == free[0]
    assert [answer.tokens for answer in found[1:]] == [tokens[:2] for tokens in free[1:]]
    assert {answer.ended for answer in found[1:]} == {"stop"}


def test_every_token_is_told_once(tiny: Tiny) -> None:
    told: dict[int, list[int]] = {}
    found = answers(
        tiny.decoder, eos_ids=[], on_token=lambda a: told.setdefault(a.number, []).append(len(a.tokens))
    )
    assert told == {answer.number: list(range(1, 21)) for answer in found}


def test_an_answer_ends_with_the_context(tiny: Tiny) -> None:
    prompt = random_rows([60])[0]
    (answer,) = answers(tiny.decoder, [prompt], eos_ids=[], max_new_tokens=50)
    assert len(answer.tokens) == 4
    assert answer.ended == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "the prompt is empty"), ([5] * 64, "64 tokens and the model's context holds 64")],
)
def test_prompts_that_cannot_be_answered(tiny: Tiny, prompt: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        answers(tiny.decoder, [PROMPTS[0], prompt])


def test_no_room_for_an_answer_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        answers(tiny.decoder, max_new_tokens=0)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A tiny base whose tokens are bytes, so that every id is a text."""
    make_tiny(tmp_path, vocab_size=259, max_position_embeddings=256)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *letters]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load(tmp_path, dtype="fp32", device="cpu")


TEXTS = ["abc", "a", "some more words", "xyz"]
SAMPLED: dict[str, Any] = {"raw": True, "max_new_tokens": 40, "temperature": 1.0, "seed": 3}


def test_stop_strings_cut_the_text(model: Model) -> None:
    free = model.generate(TEXTS, **SAMPLED)
    for number, text in enumerate(free):
        stop = text[10:13]
        assert len(stop) == 3
        cut = model.generate(TEXTS[number], stop=[stop, "never seen"], **SAMPLED)
        assert cut == text[: text.index(stop)]


def test_a_stream_is_the_same_text(model: Model) -> None:
    free = model.generate(TEXTS, **SAMPLED)
    for number, text in enumerate(free):
        assert "".join(model.stream(TEXTS[number], **SAMPLED)) == text
        stop = text[10:13]
        pieces = list(model.stream(TEXTS[number], stop=[stop], **SAMPLED))
        assert "".join(pieces) == text[: text.index(stop)]
        assert len(pieces) > 1


def test_a_closed_stream_ends_the_generation(model: Model) -> None:
    stream = model.stream("abc", **SAMPLED)
    next(stream)
    stream.close()
    with pytest.raises(UserError, match="the prompt is empty"):
        list(model.stream("", raw=True))
