"""GGUF files: what the gguf package writes is read; what lies is refused, and costs nothing."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import HEAD, VOCAB, entry, header, info, text, write_model
from lorimer.bases.gguf import GgufFile
from lorimer.bases.gguf_write import encode_value, make_header
from lorimer.bases.open import open_base
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import BaseError
from lorimer.model.families import read_spec

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_reads_as_the_gguf_package_reads_it(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "model.gguf", dtype=dtype)
    mine, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert list(mine.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = mine.tensors[tensor.name]
        wanted = (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())), tensor.n_bytes)
        assert (found.dtype, found.shape, found.nbytes) == wanted
        assert np.array_equal(mine.raw(tensor.name), tensor.data.view(np.uint8).ravel())
    assert mine.tensors["blk.0.attn_k.weight"].dtype == dtype


def test_every_kind_of_metadata_reads_as_it_was_written(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 日本")
    writer.add_array("texts", ["", "a", "日本"])
    writer.add_array("numbers", [3, 1, 2])
    writer.add_array("bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = {
        "general.architecture": "llama",
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31),
        "u64": 2**64 - 1, "i64": -(2**63), "f32": 0.5, "f64": 0.1, "yes": True, "text": "naïve 日本",
        "texts": ["", "a", "日本"], "numbers": [3, 1, 2], "bools": [True, False],
    }  # fmt: skip
    assert GgufFile(tmp_path / "a.gguf").metadata == wanted


def test_versions_2_and_3_and_another_alignment_are_read(tmp_path: Path) -> None:
    for version in (2, 3):
        aligned = entry("general.alignment", U32, struct.pack("<I", 64))
        start = header([aligned], [info("w", [4])], version=version)
        raw = start + bytes(-len(start) % 64) + struct.pack("<4f", 1, 2, 3, 4)
        (tmp_path / "a.gguf").write_bytes(raw)
        file = GgufFile(tmp_path / "a.gguf")
        assert file.raw("w").view("<f4").tolist() == [1, 2, 3, 4]


def test_reading_copies_nothing_and_writing_never_reaches_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    before = path.read_bytes()
    raw = GgufFile(path).raw("token_embd.weight")
    assert not raw.flags.owndata
    raw[:] = 0
    assert path.read_bytes() == before


W = info("w", [4])
# What is broken -> the words that say so.
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file is empty"),
    "two bytes": (b"GG", "the magic needs 4 bytes, 2 are left"),
    "another format": (header(magic=b"PK\3\4"), "does not begin with GGUF"),
    "version 1": (header(version=1), r"version is 1 \(wanted: 2 or 3\)"),
    "big endian": (header(version=3 << 24), "the file is big-endian"),
    "too many tensors": (header(tensors=2**60), "says it holds 1,152,921,504,606,846,976 tensors"),
    "too many entries": (header(count=2**63), "and 9,223,372,036,854,775,808 entries"),
    "one tensor more than there is": (header(infos=[W], tensors=2, data=16), "damaged at byte"),
    "key longer than the file": (header([struct.pack("<Q", 2**40)], count=1), "a key needs 1,099,511,"),
    "string longer than the file": (
        header([entry("k", STRING, struct.pack("<Q", 2**62))]),
        "k needs 4,611",
    ),
    "array longer than the file": (
        header([entry("k", ARRAY, struct.pack("<IQ", U32, 2**61))]),
        "k says it holds 2,305,843,009,213,693,952 values, more than the file",
    ),
    "array of strings longer than the file": (
        header([entry("k", ARRAY, struct.pack("<IQ", STRING, 2**40))]),
        "k says it holds 1,099,511,627,776 values",
    ),
    "unknown value type": (header([entry("k", 77, bytes(8))]), "k has the unknown type 77"),
    "unknown type in an array": (
        header([entry("k", ARRAY, struct.pack("<IQ", 77, 1) + bytes(8))]),
        "k has the unknown type 77",
    ),
    "arrays in arrays in arrays": (
        header([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9 + bytes(8))]),
        "k nests arrays too deeply",
    ),
    "the same tensor twice": (header(infos=[W, W], data=64), "the tensor `w` comes twice"),
    "five dimensions": (header(infos=[info("w", [1, 1, 1, 1, 1])], data=64), "`w` has 5 dimensions"),
    "a dimension of zero": (header(infos=[info("w", [0, 4])], data=64), r"sizes \[0, 4\]"),
    "sizes that overflow 64 bits": (
        header(infos=[info("w", [2**33, 2**33])], data=64),
        "more than the file",
    ),
    "unknown tensor type": (
        header(infos=[info("w", [256], kind=16)], data=256),
        "type number 16, which is",
    ),
    "removed tensor type": (header(infos=[info("w", [256], kind=4)], data=256), "type number 4, which is"),
    "half a block": (header(infos=[info("w", [48], kind=2)], data=64), "rows of 48, not a multiple of 32"),
    "data past the end": (
        header(infos=[info("w", [4], offset=32)], data=16),
        "the tensor `w` ends at byte",
    ),
    "offset past the end": (header(infos=[info("w", [4], offset=2**63)], data=16), "`w` ends at byte"),
    "offset not aligned": (
        header(infos=[info("w", [4], offset=4)], data=64),
        "`w` lies at 4, no multiple of 32",
    ),
    "alignment of zero": (
        header([entry("general.alignment", U32, bytes(4))], [W], data=64),
        "the alignment is 0",
    ),
    "alignment of 24": (
        header([entry("general.alignment", U32, struct.pack("<I", 24))], [W], data=64),
        "the alignment is 24",
    ),
    "alignment in words": (
        header([entry("general.alignment", STRING, text("32"))], [W], data=64),
        "the alignment is '32'",
    ),
    "alignment beyond the file": (
        header([entry("general.alignment", U64, struct.pack("<Q", 2**62))], [W], data=64),
        "`w` ends at byte",
    ),
}


@pytest.mark.trap("S4")
@pytest.mark.parametrize("what", BROKEN)
def test_a_lying_header_is_refused_by_name_and_costs_nothing(tmp_path: Path, what: str) -> None:
    raw, words = BROKEN[what]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(BaseError, match=words) as caught:
        GgufFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert peak < 1_000_000


@pytest.mark.trap("S4")
def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(header(infos=[info("a", [16]), info("b", [4], offset=32)], data=64))
    with pytest.raises(BaseError, match="overlap"):
        GgufFile(tmp_path / "a.gguf")


def test_the_same_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(header([entry("k", U8, b"\1"), entry("k", U8, b"\2")]))
    with pytest.raises(BaseError, match="`k` comes twice"):
        GgufFile(tmp_path / "a.gguf")


def test_a_message_about_a_broken_name_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(header([entry(b"k\xff", 77, bytes(8))]))
    with pytest.raises(BaseError, match="unknown type 77") as caught:
        GgufFile(tmp_path / "a.gguf")
    str(caught.value).encode("utf-8")


def test_a_vocabulary_with_broken_bytes_keeps_its_ids(tmp_path: Path) -> None:
    words = [b"a", b"\xff\xfe", b"b"]
    value = struct.pack("<IQ", STRING, 3) + b"".join(map(text, words))
    (tmp_path / "a.gguf").write_bytes(header([entry("tokens", ARRAY, value)]))
    tokens = GgufFile(tmp_path / "a.gguf").metadata["tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in tokens] == words


def read_or_refuse(path: Path) -> str:
    """`read`, or the refusal's message; anything else that is raised fails the test."""
    try:
        file = GgufFile(path)
        for name in file.tensors:
            assert file.raw(name).nbytes == file.tensors[name].nbytes
    except BaseError as error:
        return str(error)
    return "read"


@pytest.mark.trap("S4")
def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf").read_bytes()
    places = {*range(0, 4000, 37), *np.linspace(4000, len(whole) - 1, 60).astype(int).tolist()}
    for place in sorted(places):
        (tmp_path / "cut.gguf").write_bytes(whole[:place])
        assert read_or_refuse(tmp_path / "cut.gguf") != "read", f"cut at {place}"


ODD_VALUES: list[Any] = [
    0, 1, 2**32 - 1, -1.0, 0.0, float("nan"), float("inf"), 1e38, "", "x", True, [1], [1.5], ["a"], [],
    [-1] * VOCAB, ["a"] * VOCAB, [0.5] * VOCAB, ["\udced\udca0"] * 3,
]  # fmt: skip
MORE_KEYS = [
    "general.alignment", "split.count", "llama.attention.key_length", "llama.attention.sliding_window",
    "llama.rope.dimension_count", "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.attn_factor", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.merges", "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.pre", "tokenizer.ggml.unknown_token_id",
]  # fmt: skip


def use_or_refuse(path: Path) -> str:
    """As a run uses a base before its weights are read; any error but ours fails the test."""
    try:
        base = open_base(path)
        read_spec(base.config, path=str(path))
        base.fingerprint()
        base.eos_token_ids()
        tokenizer = Tokenizer.from_base(base)
        tokenizer.encode("t1 t2")
        tokenizer.files()
    except BaseError as error:
        return str(error)
    return "read"


def whole_model(path: Path) -> bytearray:
    settings: dict[str, Any] = {
        "tokenizer.ggml.scores": [0.0] * VOCAB,
        "tokenizer.ggml.token_type": [1] * VOCAB,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
    }
    return bytearray(write_model(path, metadata=settings).read_bytes())


@pytest.mark.trap("S4")
def test_600_mutated_headers_are_used_as_a_base_or_refused(tmp_path: Path) -> None:
    whole = whole_model(tmp_path / "whole.gguf")
    end = whole.find(b"blk.0.attn_q") + 800
    generator = np.random.default_rng(11)
    path = tmp_path / "mutated.gguf"
    outcomes = []
    tracemalloc.start()
    for _ in range(600):
        mutated = bytearray(whole)
        for place in generator.integers(4, end, generator.integers(1, 4)):
            mutated[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.integers(256)])
        path.write_bytes(mutated)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        outcomes.append(use_or_refuse(path))
        assert tracemalloc.get_traced_memory()[1] - before < 8_000_000
    tracemalloc.stop()
    assert 300 < sum(outcome != "read" for outcome in outcomes) < 600
    assert len({outcome.partition(": ")[2][:40] for outcome in outcomes}) > 20


@pytest.mark.trap("S4")
@pytest.mark.parametrize("vocabulary", ["gpt2", "llama"])
def test_every_key_with_every_odd_value_is_used_or_refused(tmp_path: Path, vocabulary: str) -> None:
    whole = whole_model(tmp_path / "whole.gguf")
    file = GgufFile(tmp_path / "whole.gguf")
    entries = {key: file.entry(key) for key in file.metadata}
    entries["tokenizer.ggml.model"] = encode_value(vocabulary)
    tensors = list(file.tensors.values())
    data = whole[-sum(-(-tensor.nbytes // 32) * 32 for tensor in tensors) :]
    path = tmp_path / "odd.gguf"
    outcomes = []
    for key in [*entries, *MORE_KEYS]:
        for value in ODD_VALUES:
            path.write_bytes(make_header(entries | {key: encode_value(value)}, tensors) + data)
            outcomes.append(use_or_refuse(path))
    assert len(outcomes) > 500
    assert 0.3 < sum(outcome != "read" for outcome in outcomes) / len(outcomes) < 0.9


@pytest.mark.trap("S4")
@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_sizes_that_the_weights_do_not_have_are_refused(tmp_path: Path, key: str) -> None:
    """Memory for a layer is taken by these numbers, before its weights are looked at."""
    metadata = {f"llama.{key}": 2**31, "llama.attention.key_length": HEAD}
    with pytest.raises(BaseError, match=r"has [\d,]+ rows \(there are \d+\)"):
        open_base(write_model(tmp_path / "a.gguf", metadata=metadata))


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", metadata={"llama.block_count": 2**32 - 1})
    with pytest.raises(BaseError, match="`block_count` 4,294,967,295"):
        open_base(path)


@pytest.mark.trap("S4")
def test_200_mutated_headers_are_read_or_refused_without_large_allocations(tmp_path: Path) -> None:
    whole = bytearray(write_model(tmp_path / "whole.gguf").read_bytes())
    generator = np.random.default_rng(7)
    path = tmp_path / "mutated.gguf"
    refused = 0
    tracemalloc.start()
    for _ in range(200):
        mutated = bytearray(whole)
        for place in generator.integers(4, 2600, generator.integers(1, 6)):
            mutated[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.integers(256)])
        path.write_bytes(mutated)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        refused += read_or_refuse(path) != "read"
        assert tracemalloc.get_traced_memory()[1] - before < 2_000_000
    tracemalloc.stop()
    assert 50 < refused < 200
