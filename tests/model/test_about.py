"""What `lorimer show` says of a base, without reading a weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorimer.model.about import computed
from model_cases import CASES
from tiny import make_tiny


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_parameters_of_the_files(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path, family, **changes)
    facts = computed(tiny.base.config, "x")
    assert facts["native"] is True
    assert sum(facts["parts"].values()) == tiny.base.parameters


def test_what_is_not_native_says_what_runs_it() -> None:
    facts = computed({"model_type": "bloom"}, "x")
    assert (facts["native"], facts["parts"], facts["why"]) == (False, None, None)
    assert facts["slower"].startswith("architecture `bloom` runs through transformers, slower: ")


def test_a_setting_that_the_decoder_does_not_compute_is_named() -> None:
    facts = computed({"model_type": "falcon", "alibi": True}, "x")
    assert "`alibi` is on" in facts["slower"]


def test_what_nothing_runs_says_why() -> None:
    facts = computed({"model_type": "blooom"}, "x")
    assert (facts["native"], facts["slower"]) == (False, None)
    assert "`blooom` is not known" in facts["why"]
    assert "`bloom`?" in facts["why"]
