"""One safetensors file: its header checked first, then read by the safetensors library."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.json_object import unique
from lorimer.bases.mapped import Bytes, MappedFile
from lorimer.errors import BaseError

if TYPE_CHECKING:
    import torch

# Far above any real file, far below what would hurt to parse.
HEADER_BYTES, HEADER_TENSORS, DIMENSIONS, SIZE = 16_000_000, 50_000, 8, 2**63
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class SafetensorsFile:
    """`tensors` by name; `tensor` and `raw` read one of them from the mapped file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._data, header = self._read_header()
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(
            isinstance(value, str) for value in self.metadata.values()
        ):
            self._fail("its __metadata__ is not text by name")
        if len(header) > HEADER_TENSORS:
            self._fail(f"it lists {len(header):,} tensors (at most {HEADER_TENSORS:,})")
        self._places: dict[str, tuple[int, int]] = {}
        self.tensors = {name: self._entry(name, info) for name, info in header.items()}
        self._check_places()

    def _fail(self, what: str) -> NoReturn:
        raise BaseError(
            f"the safetensors file is damaged or cut short: {what}",
            fix="Copy or download it again.",
            path=self.path,
        )

    def _read_header(self) -> tuple[Bytes, dict[str, Any]]:
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, HEADER_BYTES):
                    self._fail(f"its header says {length:,} bytes, the file has {size:,}")
                header = json.loads(file.read(length), object_pairs_hook=unique)
        except OSError as error:
            raise BaseError(
                f"the file cannot be read: {error.strerror or error}",
                fix="Give a file that you may read.",
                path=self.path,
            ) from error
        except RecursionError:
            self._fail("its header is not JSON")
        except ValueError as error:
            self._fail(str(error) if str(error).endswith("twice") else "its header is not JSON")
        if not isinstance(header, dict):
            self._fail("its header is not a JSON object")
        self._mapped = MappedFile(self.path)
        return self._mapped.bytes[8 + length :], header

    def _entry(self, name: str, info: Any) -> TensorEntry:
        try:
            dtype, shape = str(info["dtype"]), tuple(info["shape"])
            begin, end = info["data_offsets"]
            plain = len(shape) <= DIMENSIONS and all(
                type(value) is int and 0 <= value < SIZE for value in (*shape, begin, end)
            )
        except (KeyError, TypeError, ValueError):
            self._fail(f"`{name}` is not described as a tensor")
        if dtype not in BYTES or not plain:
            self._fail(f"`{name}` has the type {dtype} or sizes that are not known")
        if begin > end:
            self._fail(f"`{name}` begins at byte {begin:,} and ends at byte {end:,}")
        if end > len(self._data):
            self._fail(f"`{name}` ends at byte {end:,}, the file has {len(self._data):,} bytes of data")
        if math.prod(shape) * BYTES[dtype] != end - begin:
            self._fail(
                f"`{name}` takes {end - begin:,} bytes, its shape wants {math.prod(shape) * BYTES[dtype]:,}"
            )
        self._places[name] = (begin, end)
        return TensorEntry(name, dtype, shape, end - begin)

    def _check_places(self) -> None:
        last = 0
        for name, (begin, end) in sorted(self._places.items(), key=lambda item: item[1]):
            if begin < last:
                self._fail(f"`{name}` overlaps another tensor")
            if begin > last:
                self._fail(f"{begin - last:,} bytes before `{name}` belong to no tensor")
            last = end
        if last < len(self._data):
            self._fail(f"{len(self._data) - last:,} bytes at its end belong to no tensor")

    def raw(self, name: str) -> Bytes:
        """The tensor's bytes as they lie in the file, not copied."""
        begin, end = self._places[name]
        return self._data[begin:end]

    def release(self) -> None:
        """Give back the memory that reading filled."""
        self._mapped.release()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                value: torch.Tensor = file.get_tensor(name).clone()
                return value
        except (SafetensorError, OSError) as error:
            self._fail(str(error))
