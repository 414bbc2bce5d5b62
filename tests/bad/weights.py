# ruff: noqa: E501  (tables)
"""Weights of a base: files written out byte by byte, and sharded folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bad.case import Case, Make, both, gone, put

FILE = "base/model.safetensors"
INDEX = "base/model.safetensors.index.json"
NORM = "model.norm.weight"
AGAIN = "Copy or download it again."


def raw(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A file from its header; `length` lies about how long that is."""
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(said) if length is None else length).to_bytes(8, "little") + said + data


def one(begin: Any = 0, end: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def bytes_of(what: str, content: bytes, *says: str) -> Case:
    return Case(what, put(FILE, content), ("base/model.safetensors: ", *says, AGAIN))


def weights(change: Callable[[dict[str, Any]], Any]) -> Make:
    """The sound weights with a change, written by the library."""

    def make(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return make


def sharded(**files: str) -> Make:
    """The weights under the name of a first shard, and an index that names these files."""

    def make(folder: Path) -> None:
        (folder / FILE).rename(folder / "base/model-00001-of-00002.safetensors")
        listed = {NORM: "model-00001-of-00002.safetensors"} | files
        (folder / INDEX).write_text(json.dumps({"weight_map": listed}))

    return make


def as_type(dtype: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({NORM: tensors[NORM].astype(dtype)})


def with_nan(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


CASES = [
    # the header
    bytes_of("an empty file", b"", "its header says 0 bytes, the file has 0"),
    bytes_of("five bytes", b"\1\0\0\0\0", "the file has 5"),
    bytes_of("a pickle", b"\x80\x02}q\x00X\x05\x00\x00\x00model.", "its header says"),
    bytes_of("a header that claims a terabyte", raw({}, length=2**40), "its header says 1,099,511,627,776 bytes"),
    bytes_of("a header of 100 MB", raw(b" " * 100_000_000, b""), "its header says 100,000,000 bytes"),
    bytes_of("a header that is not JSON", raw(b"{nothing}"), "its header is not JSON"),
    bytes_of("a header that is not UTF-8", raw(b'{"\xff": 1}'), "its header is not JSON"),
    bytes_of("a header that is a list", raw([1]), "its header is not a JSON object"),
    bytes_of("brackets without end", raw(b"[" * 100_000), "its header is not JSON"),
    bytes_of("a name twice", raw(b'{"a":' + json.dumps(one()["a"]).encode() + b',"a":1}'), "`a` is there twice"),
    bytes_of("more tensors than any model", raw({f"t{n}": one(0, 0, [0])["a"] for n in range(50_001)}), "it lists 50,001 tensors"),
    bytes_of("metadata that is a list", raw({"__metadata__": ["x"]} | one()), "its __metadata__ is not text by name"),
    # one tensor
    bytes_of("a number for a tensor", raw({"a": 5}), "`a` is not described as a tensor"),
    bytes_of("no offsets", raw({"a": {"dtype": "F32", "shape": [4]}}), "`a` is not described as a tensor"),
    bytes_of("an unknown type", raw(one(dtype="Q9")), "`a` has the type Q9"),
    bytes_of("a type that is a list", raw(one(dtype=["F32"])), "`a` has the type"),
    bytes_of("a fraction for a size", raw(one(shape=[4.0])), "`a` has the type F32 or sizes that are not known"),
    bytes_of("a negative size", raw(one(shape=[-2, -2])), "or sizes that are not known"),
    bytes_of("sizes whose product overflows", raw(one(shape=[2**62, 4])), "its shape wants 73,786,976,294,838,206,464"),
    bytes_of("a size of thousands of digits", raw(one(shape=[10**4000])), "or sizes that are not known"),
    bytes_of("offsets the wrong way round", raw(one(16, 0)), "`a` begins at byte 16 and ends at byte 0"),
    bytes_of("an offset past the end", raw(one(2**62, 2**62 + 16)), "the file has 16 bytes of data"),
    bytes_of("data cut short", raw(one(), bytes(15)), "`a` ends at byte 16, the file has 15 bytes"),
    bytes_of("fewer bytes than the shape", raw(one(0, 12)), "takes 12 bytes, its shape wants 16"),
    # several
    bytes_of("shared bytes", raw(one() | {"b": one(12, 16, [1])["a"]}), "`b` overlaps another tensor"),
    bytes_of("a hole", raw(one(0, 4, [1]) | {"b": one(12, 16, [1])["a"]}), "8 bytes before `b` belong to no tensor"),
    bytes_of("bytes after the last", raw(one(), bytes(99)), "83 bytes at its end belong to no tensor"),
    # what the model has
    Case("a tensor is missing", weights(lambda t: t.pop(NORM)), ("`model.norm.weight` is missing", "not copied")),
    Case("a tensor too many", weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(60, np.float32)})),
         ("has no place for the weight `model.layers.0.self_attn.q_proj.bias`", "do not belong together")),
    Case("a tensor of another shape", weights(lambda t: t.update({NORM: np.ones(35, np.float32)})), ("`model.norm.weight` has the shape [35] (wanted: [36])", "do not belong together")),
    Case("whole numbers for weights", weights(as_type(np.int32)), ("the weight `model.norm.weight` is I32", "Get the model as safetensors")),
    Case("truth values for weights", weights(as_type(np.bool_)), ("the weight `model.norm.weight` is BOOL", "Get the model as safetensors")),
    Case("NaN in a weight", weights(with_nan), ("its weight `model.layers.1.mlp.up_proj.weight` holds NaN", "Copy or download")),
    Case("a tensor of no dimension", weights(lambda t: t.update({NORM: np.ones((), np.float32)})), ("`model.norm.weight` has the shape [] (wanted: [36])", "do not belong together")),
    # the files of a folder
    Case("no weights", gone(FILE), ("base: model.safetensors is missing", "Copy")),
    Case("weights in a pickle", both(gone(FILE), put("base/pytorch_model.bin", b"\x80\x02}")),
         ("base: the weights are in pytorch_model.bin, a pickle", "as safetensors")),
    Case("a shard is missing", sharded(x="model-00002-of-00002.safetensors"), ("the shard model-00002-of-00002.safetensors", "is missing", "Copy")),
    Case("a shard outside the folder", sharded(x="../train.safetensors"), ("the index names `../train.safetensors`", "in the same folder")),
    Case("a shard at the root", sharded(x="/etc/passwd"), ("the index names `/etc/passwd`", "in the same folder")),
    Case("a shard that is a pickle", sharded(x="pytorch_model-00002-of-00002.bin"), ("the index names `pytorch_model-00002-of-00002.bin`", "(wanted: a .safetensors file")),
    Case("an index that lists no files", both(gone(FILE), put(INDEX, '{"weight_map": ["a"]}')), ("index.json: weight_map should give a file", "Copy")),
    Case("an index that is cut off", both(gone(FILE), put(INDEX, '{"weight_map": {')), ("model.safetensors.index.json: this is not JSON", "Copy")),
]  # fmt: skip
