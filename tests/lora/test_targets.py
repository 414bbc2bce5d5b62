"""`target_modules` and `layers` against what a model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorimer.errors import ConfigError
from lorimer.lora.targets import all_targets, describe_targets, select_targets
from lorimer.model.decoder import Decoder
from tiny import make_tiny

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LAYERS = 12  # two digits, so that layer 1 and layer 11 can be told apart


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("base")
    return make_tiny(folder, num_hidden_layers=LAYERS, hidden_size=12, intermediate_size=8).decoder


def chosen(decoder: Decoder, modules: Any, layers: Any = None) -> set[str]:
    return {target.path for target in select_targets(decoder, modules, layers)}


def paths(names: list[str], layers: Any = range(LAYERS)) -> set[str]:
    return {
        f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
        for layer in layers
        for name in names
    }


@pytest.mark.trap(35)
@pytest.mark.parametrize(
    ("modules", "layers", "expected"),
    [
        ("all-linear", None, paths(ATTENTION + MLP)),
        ("attention", None, paths(ATTENTION)),
        ("mlp", None, paths(MLP)),
        ("q_proj", None, paths(["q_proj"])),
        (["q_proj", "down_proj"], None, paths(["q_proj", "down_proj"])),
        (["self_attn.q_proj"], None, paths(["q_proj"])),
        (["model.layers.1.self_attn.q_proj"], None, paths(["q_proj"], [1])),
        (["layers.1.self_attn.q_proj"], None, paths(["q_proj"], [1])),
        (r"model\.layers\.\d\.mlp\.(up|down)_proj", None, paths(["up_proj", "down_proj"], range(10))),
        (r".*\.1\.self_attn\..*", None, paths(ATTENTION, [1])),
        ("all-linear", [0, 11], paths(ATTENTION + MLP, [0, 11])),
        ("mlp", "3-5", paths(MLP, [3, 4, 5])),
        ("mlp", "last:2", paths(MLP, [10, 11])),
        ("mlp", " last:12 ", paths(MLP)),
        (["v_proj"], [1], paths(["v_proj"], [1])),
    ],
)
def test_chosen(decoder: Decoder, modules: Any, layers: Any, expected: set[str]) -> None:
    found = select_targets(decoder, modules, layers)
    assert {target.path for target in found} == expected
    assert len(found) == len(expected)
    assert found == [target for target in all_targets(decoder) if target.path in expected]


@pytest.mark.trap(35)
@pytest.mark.parametrize(
    ("modules", "layers", "words"),
    [
        ("q_porj", None, ["q_porj", "q_proj"]),
        (["q_proj", "q_porj"], None, ["`q_porj`", "Did you mean `q_proj`", "embed_tokens, gate_proj"]),
        (["query_key_value"], None, ["`query_key_value`", "q_proj"]),
        (["proj"], None, ["`proj`"]),
        (r"layers\.1\..*", None, ["matches no linear layer", "model.layers.0.self_attn.q_proj"]),
        (r"model.(", None, ["not a valid pattern"]),
        ("all-linear", [12], ["goes outside the model", "0 to 11"]),
        ("all-linear", [-1], ["goes outside the model"]),
        ("all-linear", "last:13", ["goes outside the model"]),
        ("all-linear", "last:0", ["goes outside the model"]),
        ("all-linear", "5-3", ["goes outside the model"]),
        ("all-linear", "5-12", ["goes outside the model"]),
        ("all-linear", [], ["goes outside the model"]),
        ("all-linear", "some", ["`lora.layers: some` is not understood", "last:4"]),
        ([r"model.layers.1.mlp.up_proj"], [2], ["leaves none"]),
    ],
)
def test_what_matches_nothing_says_what_there_is(
    decoder: Decoder, modules: Any, layers: Any, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(decoder, modules, layers)
    for word in words:
        assert word in str(caught.value)


def test_an_empty_list_trains_nothing_and_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError):
        chosen(decoder, [])


@pytest.mark.parametrize(
    ("modules", "layers", "text"),
    [
        (["q_proj", "v_proj"], None, "q_proj, v_proj in all 12 layers"),
        (["q_proj"], "last:2", "q_proj in 2 of 12 layers"),
        (r".*(\.1\.self_attn\.q_proj|mlp\.up_proj)", None, "up_proj x12, q_proj x1"),
    ],
)
def test_describe(decoder: Decoder, modules: Any, layers: Any, text: str) -> None:
    targets = sorted(select_targets(decoder, modules, layers), key=lambda t: t.name != "up_proj")
    assert describe_targets(targets, LAYERS) == text
