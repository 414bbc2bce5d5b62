"""Every architecture against transformers, alone, packed, token by token, and past its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorimer.data.pack import make_pack
from lorimer.errors import BaseError
from lorimer.model.cache import KVCache
from lorimer.model.families import read_spec
from lorimer.model.loss import pack_losses
from model_cases import CASES
from tiny import FAMILIES, SHAPE, difference, example, hf_logits, make_tiny, our_logits, random_rows

LENGTHS = (1, 7, 7, 12, 30, 61)
LONG = 90  # past every context of these models


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Rows packed together, one of them longer than the model's context."""
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path, family, **changes)
    learned = tiny.decoder.spec.learned_positions  # a table has an end
    rows = random_rows((*LENGTHS, 64 if learned else LONG))
    for row, mine in zip(rows, our_logits(tiny.decoder, rows), strict=True):
        theirs = hf_logits(tiny.hf, row)
        assert difference(mine, theirs) < 1e-4
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))


@pytest.mark.trap(56)
@pytest.mark.parametrize(
    "name", [name for name, (_, changes) in CASES.items() if "rope_parameters" in changes]
)
def test_four_times_the_context(name: str, tmp_path: Path) -> None:
    """The last of 256 positions, of a model made for 64, with every scaling of positions."""
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path, family, **changes)
    row = random_rows([256])[0]
    mine, theirs = our_logits(tiny.decoder, [row])[0], hf_logits(tiny.hf, row)
    assert difference(mine, theirs) < 1e-4
    assert torch.equal(mine.argmax(-1), theirs.argmax(-1))


@pytest.mark.trap(17)
@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_pack_never_see_each_other(name: str, tmp_path: Path) -> None:
    """Change all tokens of one row: the other rows' logits keep every bit."""
    family, changes = CASES[name]
    decoder = make_tiny(tmp_path, family, **changes).decoder
    rows = random_rows(LENGTHS)
    before = our_logits(decoder, rows)
    for changed in range(len(rows)):
        others = [*rows]
        others[changed] = [(token + 5) % 101 for token in rows[changed]]
        after = our_logits(decoder, others)
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            # The tokens of an expert are one product, whose rounding depends on how many they are.
            same = torch.equal(old, new) or (
                decoder.spec.experts is not None and difference(old, new) < 2e-6
            )
            assert same == (number != changed)


@pytest.mark.trap(17)
@pytest.mark.parametrize("name", CASES)
def test_packed_losses_equal_single_losses(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    decoder = make_tiny(tmp_path, family, **changes).decoder
    examples = [example(row) for row in random_rows((5, 9, 9, 40, 3))]
    pack = make_pack(examples, range(5))
    together = pack_losses(decoder, pack)
    for place, row in enumerate(pack.rows):
        alone = pack_losses(decoder, make_pack([examples[row]], [0]))
        torch.testing.assert_close(together[pack.owner_M == place], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if "dynamic" not in n and "longrope" not in n])
def test_token_by_token_equals_the_whole_row(name: str, tmp_path: Path) -> None:
    """Ragged rows side by side; the cache grows, and a row leaves it on the way."""
    family, changes = CASES[name]
    decoder = make_tiny(tmp_path, family, **changes).decoder
    rows, starts = random_rows((20, 33, 27)), [4, 15, 1]
    whole = our_logits(decoder, rows)
    cache = KVCache(decoder.spec, 3, 18, torch.float32, decoder.device)
    with torch.no_grad():
        ids = torch.tensor([token for row, n in zip(rows, starts, strict=True) for token in row[:n]])
        decoder.hidden(ids, starts, cache=cache, cache_rows=[0, 1, 2])
        assert cache.lengths == starts
        here = [0, 1, 2]
        for step in range(16):
            if step == 6:
                here = [2, 0]
                cache.keep(here)
            if max(cache.lengths) + 1 > cache.capacity:
                cache.grow(cache.capacity + 7)
            at = [starts[row] + step for row in here]
            tokens = torch.tensor([rows[row][place] for row, place in zip(here, at, strict=True)])
            logits = decoder.logits(decoder.next_hidden(tokens, cache))
            for mine, row, place in zip(logits, here, at, strict=True):
                assert difference(mine, whole[row][place]) < 2e-5


def test_base_is_computed_with_adapted_off(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    row = random_rows([8])
    on = our_logits(tiny.decoder, row)[0]
    tiny.decoder.adapted = False
    assert torch.equal(our_logits(tiny.decoder, row)[0], on)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_near_float32(family: str, tmp_path: Path) -> None:
    """bf16 rounds each activation by up to 2^-9; three layers of tiny random weights leave about 2 %."""
    from lorimer.model.load import Place, load_decoder

    tiny = make_tiny(tmp_path, family)
    narrow = load_decoder(tiny.base, Place(torch.device("cpu"), torch.bfloat16))
    row = random_rows([30])
    exact = our_logits(tiny.decoder, row)[0]
    mine = our_logits(narrow, row)[0]
    assert mine.dtype == torch.float32
    # A mixture's router may send a token to another expert for a rounding.
    assert float((mine - exact).norm() / exact.norm()) < (0.1 if narrow.spec.experts else 0.03)


BASIC = SHAPE | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "qwen9"},
            ["`qwen9` is not supported", "Did you mean `qwen", "llama, mistral, qwen2"],
        ),
        ({"hidden_act": "mish"}, ["`mish`", "silu"]),
        ({"num_key_value_heads": 4}, ["6 attention heads", "4 key/value heads"]),
        ({"num_attention_heads": None}, ["cannot be used"]),
        ({"num_attention_heads": "many"}, ["cannot be used", "many"]),
        ({"rope_scaling": {"type": "su-per"}}, ["`su-per`", "yarn"]),
    ],
)
def test_configs_that_cannot_be_used(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BaseError) as caught:
        read_spec(BASIC | change, path="here/config.json")
    for word in ("here/config.json", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "num_hidden_layers"]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(BaseError, match=f"`{key}` is missing"):
        read_spec({k: v for k, v in BASIC.items() if k != key}, path="p")


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 4}, (4, 4, 4)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "qwen2", "sliding_window": 4}, ()),
        ({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False}, ()),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 4, 4),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 4,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (None, 4, None),
        ),
    ],
)
def test_windows(change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read_spec(BASIC | change, path="p").windows == windows


def test_defaults_of_what_a_config_may_leave_out() -> None:
    needed = {
        k: SHAPE[k]
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    spec = read_spec(needed | {"model_type": "llama"}, path="p")
    assert (spec.kv_heads, spec.head_dim, spec.rope.theta, spec.tied_head) == (6, 6, 10_000.0, False)
    assert read_spec(needed | {"model_type": "qwen3"}, path="p").head_dim == 128


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", -1),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**20),
        ("vocab_size", "many"),
        ("head_dim", [3]),
        ("max_position_embeddings", True),
        ("sliding_window", -4),
        ("rms_norm_eps", "x"),
        ("rope_theta", float("inf")),
    ],
)
def test_a_size_that_is_none_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BaseError, match=rf"`{name}` is .*\(wanted: a"):
        read_spec({"model_type": "mistral"} | SHAPE | {name: value}, path="x")
