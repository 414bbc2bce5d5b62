"""safetensors files: what the library writes is read; what lies is refused before the library sees it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorimer.bases.safetensors import SafetensorsFile
from lorimer.errors import BaseError

torch.set_num_threads(1)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(5).to(torch.bfloat16),
    "c": torch.arange(4).to(torch.float16).view(2, 2),
    "d": torch.arange(3),
    "e": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header; `length` lies about how long the header is."""
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(said) if length is None else length).to_bytes(8, "little") + said + data


def tensor(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_it_reads_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "note": "é"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "note": "é"}
    wanted = load_file(path)
    assert file.tensors.keys() == wanted.keys()
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
    for name, value in wanted.items():
        found = file.tensors[name]
        assert found.shape == tuple(value.shape)
        assert names.get(found.dtype, torch.bool) == value.dtype
        assert found.nbytes == value.nbytes
        assert (
            file.raw(name).tobytes() == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        assert torch.equal(file.tensor(name), value)


def test_reading_copies_nothing_and_writing_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    raw = file.raw("a")
    assert not raw.flags.owndata
    raw[:] = 0
    file.tensor("c").zero_()
    assert path.read_bytes() == before


DATA = bytes(16)
# What is broken -> the words that say so.
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "its header says 0 bytes, the file has 0"),
    "five bytes": (b"\1\0\0\0\0", "its header says 1 bytes, the file has 5"),
    "header longer than the file": (raw_file({}, length=2**40), "its header says 1,099,511,627,776 bytes"),
    "header above the limit": (
        raw_file(b"{}".ljust(16_000_001)),
        "its header says 16,000,001 bytes, the file has 16,000,009",
    ),
    "a pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00model.", "its header says"),
    "not JSON": (raw_file(b"{nothing}"), "its header is not JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "its header is not JSON"),
    "a list": (raw_file([1]), "its header is not a JSON object"),
    "brackets without end": (raw_file(b"[" * 100_000), "its header is not JSON"),
    "a number for a tensor": (raw_file({"a": 5}), "`a` is not described as a tensor"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [4]}}), "`a` is not described as a tensor"),
    "three offsets": (
        raw_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, DATA),
        "`a` is not described as a tensor",
    ),
    "unknown type": (raw_file({"a": tensor(dtype="Q9")}, DATA), "`a` has the type Q9"),
    "a fraction for a size": (raw_file({"a": tensor(shape=[4.0])}, DATA), "`a` has the type F32 or sizes"),
    "true for a size": (raw_file({"a": tensor(0, 4, shape=[True])}, DATA), "or sizes that are not known"),
    "a negative size": (raw_file({"a": tensor(shape=[-2, -2])}, DATA), "or sizes that are not known"),
    "a negative offset": (raw_file({"a": tensor(-16, 0)}, DATA), "or sizes that are not known"),
    "offsets the wrong way round": (
        raw_file({"a": tensor(16, 0)}, DATA),
        "`a` begins at byte 16 and ends at byte 0",
    ),
    "data cut short": (raw_file({"a": tensor()}, bytes(15)), "`a` ends at byte 16, the file has 15 bytes"),
    "offset past the end": (raw_file({"a": tensor(2**62, 2**62 + 16)}, DATA), "`a` ends at byte 4,611,"),
    "fewer bytes than the shape": (
        raw_file({"a": tensor(0, 12)}, DATA),
        "takes 12 bytes, its shape wants 16",
    ),
    "a shape that overflows": (
        raw_file({"a": tensor(shape=[2**62, 4])}, DATA),
        "takes 16 bytes, its shape wants 73,786,976,294,838,206,464",
    ),
    "shared bytes": (
        raw_file({"a": tensor(), "b": tensor(12, 16, shape=[1])}, DATA),
        "`b` overlaps another tensor",
    ),
    "the same bytes": (raw_file({"a": tensor(), "b": tensor()}, DATA), "`b` overlaps another tensor"),
    "more tensors than any model": (
        raw_file({f"t{n}": tensor(0, 0, shape=[0]) for n in range(50_001)}),
        r"it lists 50,001 tensors \(at most 50,000\)",
    ),
}


@pytest.mark.trap("S4")
@pytest.mark.parametrize("what", BROKEN)
def test_a_lying_header_is_refused_by_name(tmp_path: Path, what: str) -> None:
    raw, words = BROKEN[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(BaseError, match=words) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.trap("S4")
def test_a_header_that_says_a_terabyte_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file({}, length=2**40))
    tracemalloc.start()
    with pytest.raises(BaseError):
        SafetensorsFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


HUGE = 10**4200
ODD: dict[str, Any] = {
    "sizes of thousands of digits": {"a": tensor(shape=[HUGE, HUGE])},
    "metadata that is a list": {"__metadata__": ["x"], "a": tensor()},
    "a number in the metadata": {"__metadata__": {"x": 1}, "a": tensor()},
}


@pytest.mark.trap("S4")
@pytest.mark.parametrize("what", ODD)
def test_sizes_and_metadata_without_sense_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "a").write_bytes(raw_file(ODD[what], DATA))
    with pytest.raises(BaseError):
        SafetensorsFile(tmp_path / "a")


def test_a_message_about_a_broken_name_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(raw_file(b'{"\\ud800": 5}'))
    with pytest.raises(BaseError) as caught:
        SafetensorsFile(tmp_path / "a")
    str(caught.value).encode("utf-8")


@pytest.mark.trap("S4")
def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({name: value for name, value in TENSORS.items() if value.numel()}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for place in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:place])
        with pytest.raises(BaseError, match="damaged or cut short"):
            SafetensorsFile(tmp_path / "cut")


@pytest.mark.trap("S4")
def test_200_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(3)
    refused = 0
    for _ in range(200):
        mutated = bytearray(whole)
        for place in generator.integers(0, end, generator.integers(1, 3)):
            mutated[place] = generator.choice([0x22, 0x30, 0x39, 0x7D, generator.integers(32, 127)])
        (tmp_path / "mutated").write_bytes(mutated)
        try:
            file = SafetensorsFile(tmp_path / "mutated")
            for name in file.tensors:
                assert file.raw(name).nbytes == file.tensors[name].nbytes
        except BaseError:
            refused += 1
    assert 100 < refused < 200


def test_a_file_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="cannot be read: No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")


@pytest.mark.trap("S4")
@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": tensor(0, 4, shape=[1]), "b": tensor(12, 16, shape=[1])}, "8 bytes before `b` belong to no"),
        ({"a": tensor(0, 4, shape=[1])}, "12 bytes at its end belong to no tensor"),
        (b'{"a": 1, "a": 2}', "`a` is there twice"),
    ],
)
def test_bytes_that_nobody_owns_and_names_twice_are_refused(
    tmp_path: Path, header: Any, words: str
) -> None:
    """As the library does: what one reader skips another may read."""
    (tmp_path / "a").write_bytes(raw_file(header, DATA))
    with pytest.raises(BaseError, match=words):
        SafetensorsFile(tmp_path / "a")


def test_what_the_library_refuses_is_said_in_our_words(tmp_path: Path) -> None:
    """A file that became another after its header was read."""
    (tmp_path / "a").write_bytes(raw_file({"a": tensor()}, DATA))
    file = SafetensorsFile(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(BaseError, match="damaged or cut short"):
        file.tensor("a")
