"""A base that is its config.json alone: enough to plan for, without weights."""

from __future__ import annotations

import json
from pathlib import Path

from lorimer.bases.mapped import Bytes
from lorimer.bases.open import SMALL_FILE, BaseFiles
from lorimer.errors import BaseError


class ShapeBase(BaseFiles):
    """A folder with a config.json, or that file. Raises BaseError if it is none."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        file = path / "config.json" if path.is_dir() else path
        self.path = path
        try:
            if file.stat().st_size > SMALL_FILE:
                raise BaseError("this is too large for a config.json", path=file)
            value = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BaseError(
                f"cannot be read: {error.strerror}", fix="Give a folder with a config.json.", path=file
            ) from error
        except (ValueError, RecursionError) as error:
            raise BaseError(f"this is not JSON: {error}", path=file) from error
        if not isinstance(value, dict):
            raise BaseError("this should be a JSON object", path=file)
        self.config, self.tokenizer_config, self.generation_config = value, {}, {}
        self.tensors = {}

    def raw(self, name: str) -> Bytes:
        raise BaseError(f"the weight `{name}` is missing", path=self.path)

    def release(self) -> None:
        """Nothing was read."""
