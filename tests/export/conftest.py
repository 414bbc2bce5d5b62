"""A base with tokenizer and template, an adapter trained on it, and both opened for export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorimer.bases.open import open_base
from lorimer.config import LoraConfig
from lorimer.export.source import Source, open_source
from lorimer.lora.adapter import new_adapter
from lorimer.model.decoder import Decoder
from lorimer.model.load import load_decoder
from small_base import write_chat_base
from tiny import FP32, Tiny, save, shake

Made = tuple[Source, Decoder]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """make(family, base={config changes}, **lora settings) -> what is exported, and the live model."""

    def made(family: str = "llama", *, base: Any = None, size: float = 0.15, **lora: Any) -> Made:
        path = base if isinstance(base, Path) else tmp_path / "base"
        if not isinstance(base, Path):
            write_chat_base(path, family, **(base or {}))
        files = open_base(path)
        tiny = Tiny(path, None, files, load_decoder(files, FP32))
        adapter, _ = new_adapter(tiny.decoder, LoraConfig(**({"r": 3, "alpha": 5} | lora)), seed=3)
        shake(adapter, size=size)
        folder = save(tmp_path / f"adapter-{path.name}", tiny, adapter)
        return open_source(str(folder)), tiny.decoder

    return made
