"""A tiny base and the settings of a short run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from small_base import write_chat_base, write_rows


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def short_run(tmp_path: Path, tiny_base: Path) -> dict[str, Any]:
    """21 rows in steps of 6, two epochs, nothing saved on the way; tests change what they look at."""
    return {
        "base": str(tiny_base),
        "data": {"train": str(write_rows(tmp_path / "train.jsonl", 21))},
        "lora": {"r": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 6, "learning_rate": 5e-3, "dtype": "fp32", "threads": 1},
        "evaluate": {"max_new_tokens": 3},
        "output": {"dir": str(tmp_path / "runs"), "name": "run", "save_every": "never"},
    }
