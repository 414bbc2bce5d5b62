"""Whether transformers is here and knows an architecture, and what is said of one; imports no torch."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from lorimer.errors import BaseError
from lorimer.model.families import FAMILIES

EXTRA = "pip install 'lorimer[transformers]'"
LEAST_VERSION = 5


def slower(config: Mapping[str, Any], why: str) -> str:
    """What a person is told of such a base."""
    return f"architecture `{config.get('model_type')}` runs through transformers, slower: {why}"


def check_known(config: Mapping[str, Any], why: str, *, path: Any, brings_code: bool = False) -> None:
    """Raise BaseError where transformers is not installed or has no code for the architecture, with what is
    near."""
    named = str(config.get("model_type"))
    _check_installed(named, why, path)
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and named in CONFIG_MAPPING:
        return
    version = importlib.metadata.version("transformers")
    near = _near(named, {*FAMILIES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
    own = ""
    if brings_code:
        own = " Its config names code in the model's own folder (`auto_map`), which is never run."
    raise BaseError(
        f"the architecture `{named}` is not known: neither to lorimer nor to transformers {version}",
        fix=(near or f"lorimer's own: {', '.join(FAMILIES)}.") + own,
        path=path,
    )


def _check_installed(named: str, why: str, path: Any) -> None:
    version = ""
    if importlib.util.find_spec("transformers") is not None:
        version = importlib.metadata.version("transformers")
    number = re.match(r"\d+", version)
    if number and int(number[0]) >= LEAST_VERSION:
        return
    found = (
        f"version {version} is installed (wanted: {LEAST_VERSION})" if version else "it is not installed"
    )
    near = _near(named, FAMILIES, "The nearest that runs without it")
    raise BaseError(
        f"the architecture `{named}` needs transformers, and {found}: {why}",
        fix=f"Install it: {EXTRA}. " + (near or f"Without it run: {', '.join(FAMILIES)}."),
        path=path,
    )


def _near(named: str, known: Any, text: str = "Did you mean") -> str:
    """A sentence that names the nearest architecture, or nothing."""
    found = difflib.get_close_matches(named, sorted(known), 1, cutoff=0.5)
    if not found:
        return ""
    return f"{text} `{found[0]}`?" if text.startswith("Did") else f"{text}: `{found[0]}`."
