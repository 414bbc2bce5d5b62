# ruff: noqa: E501  (tables)
"""GGUF files, written out byte by byte, and a sound one with other entries."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from bad.case import Case, Make, edit, put
from gguf_files import entry, header, info, text

FILE = "base.gguf"
TRAIN = ("train", "c.yaml", "base=base.gguf")
SHOW = ("show", FILE)
U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
W = info("w", [4])
AGAIN = "ownload"


def raw(what: str, content: bytes, *says: str) -> Case:
    return Case(what, put(FILE, content), ("base.gguf: ", *says), SHOW)


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def entries(**values: Any) -> Make:
    """The sound file with other entries; `a__b` is `a.b`, and None takes one away."""

    def make(folder: Path) -> None:
        from gguf import GGUFReader, GGUFValueType, GGUFWriter

        reader = GGUFReader(folder / FILE)
        given = {key.replace("__", "."): value for key, value in values.items()}
        writer = GGUFWriter(folder / "new.gguf", "llama")
        for key, field in reader.fields.items():
            known = key.startswith("GGUF.") or key in ("general.architecture", *given)
            if not known and field.contents() != []:
                kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), kind, inner)
        kinds = {
            int: GGUFValueType.INT32,
            float: GGUFValueType.FLOAT32,
            str: GGUFValueType.STRING,
            list: GGUFValueType.ARRAY,
        }
        for key, value in given.items():
            if value is not None and key != "general.architecture":
                inner = kinds[type(value[0])] if isinstance(value, list) else None
                writer.add_key_value(key, value, kinds[type(value)], inner)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / "new.gguf").replace(folder / FILE)

    return make


def says(what: str, *words: str, **values: Any) -> Case:
    return Case(what, entries(**values), ("base.gguf: ", *words), TRAIN)


def renamed(old: str, new: str) -> Make:
    assert len(old) == len(new)
    return edit(FILE, old.encode(), new.encode())


CASES = [
    # the header
    raw("an empty file", b"", "the file is empty", AGAIN),
    raw("two bytes", b"GG", "the magic needs 4 bytes, 2 are left", AGAIN),
    raw("another format", header(magic=b"PK\3\4"), "does not begin with GGUF", "Give"),
    raw("llama.cpp's older format", b"ggjt" + struct.pack("<I", 3), "does not begin with GGUF", "Give"),
    raw("version 1", header(version=1), "the GGUF version is 1 (wanted: 2 or 3)", "convert"),
    raw("version 99", header(version=99), "the GGUF version is 99", "convert"),
    raw("the other order of bytes", header(version=3 << 24), "big-endian", "little-endian"),
    raw("more tensors than the file has room for", header(tensors=2**60), "says it holds 1,152,921,504,606,846,976 tensors", AGAIN),
    raw("more entries than the file has room for", header(count=2**63), "9,223,372,036,854,775,808 entries", AGAIN),
    raw("one tensor more than there is", header(infos=[W], tensors=2, data=16), "damaged at byte", AGAIN),
    # entries
    raw("a key longer than the file", header([struct.pack("<Q", 2**40)], count=1), "a key needs 1,099,511,627,776 bytes", AGAIN),
    raw("a text longer than the file", header([entry("k", STRING, struct.pack("<Q", 2**62))]), "k needs 4,611", AGAIN),
    raw("an array longer than the file", header([entry("k", ARRAY, struct.pack("<IQ", U32, 2**61))]), "more than the file has room for", AGAIN),
    raw("arrays within arrays", header([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]), "nests arrays too deeply", AGAIN),
    raw("an unknown kind of entry", header([entry("k", 99, b"")]), "k has the unknown type 99", AGAIN),
    raw("a key twice", header([u32("k", 1), u32("k", 2)]), "the key `k` comes twice", AGAIN),
    raw("an alignment of 0", header([u32("general.alignment", 0)], [W], data=64), "the alignment is 0", AGAIN),
    raw("an alignment of 3", header([u32("general.alignment", 3)], [W], data=64), "the alignment is 3", AGAIN),
    raw("an alignment of 2 GB", header([u32("general.alignment", 2**31)], [W], data=64), "ends at byte", AGAIN),
    raw("an alignment that is text", header([entry("general.alignment", STRING, text("32"))], [W], data=64), "the alignment is '32'", AGAIN),
    # tensors
    raw("a tensor twice", header(infos=[W, W], data=64), "the tensor `w` comes twice", AGAIN),
    raw("an unknown type of tensor", header(infos=[info("w", [4], kind=250)], data=64), "the type number 250", "Choose another quantisation"),
    raw("a type that llama.cpp has dropped", header(infos=[info("w", [32], kind=4)], data=64), "the type number 4", "Choose another"),
    raw("nine dimensions", header(infos=[info("w", [1] * 9)], data=64), "`w` has 9 dimensions", AGAIN),
    raw("a size of 0", header(infos=[info("w", [0])], data=64), "`w` has the sizes [0]", AGAIN),
    raw("sizes whose product overflows", header(infos=[info("w", [2**33, 2**33])], data=64), "more than the file can hold", AGAIN),
    raw("half of a block", header(infos=[info("w", [33], kind=8)], data=64), "rows of 33, not a multiple of 32", AGAIN),
    raw("a tensor past the end", header(infos=[info("w", [4], offset=2**40)], data=64), "the tensor `w` ends at byte", AGAIN),
    raw("a tensor cut short", header(infos=[info("w", [64])], data=64), "the tensor `w` ends at byte", AGAIN),
    raw("an offset out of line", header(infos=[info("w", [4], offset=4)], data=64), "the tensor `w` lies at 4, no multiple of 32", AGAIN),
    raw("tensors that share bytes", header(infos=[info("a", [16]), info("b", [16])], data=64), "overlaps another", AGAIN),
    # a model
    raw("no model in it", header(infos=[W], data=64), "the architecture `None` is not supported", "Supported: llama"),
    Case("an architecture that is not known", renamed("\5\0\0\0\0\0\0\0llama", "\5\0\0\0\0\0\0\0mamba"), ("base.gguf: the architecture `mamba` is not supported", "Supported: llama"), TRAIN),
    says("no heads", "attention.head_count", AGAIN, llama__attention__head_count=0),
    says("negative layers", "`block_count` -3", AGAIN, llama__block_count=-3),
    says("a billion layers", "`block_count` 1,000,000,000", AGAIN, llama__block_count=10**9),
    says("layers that are text", "`block_count` 'three'", AGAIN, llama__block_count="three"),
    says("no width", "`feed_forward_length` is missing", AGAIN, llama__feed_forward_length=None),
    says("an infinite base of the rope", "`rope_theta` is inf", "original", llama__rope__freq_base=float("inf")),
    says("one part of several", "one of 4 parts of a split GGUF file", "llama-gguf-split --merge", split__count=4),
    says("no vocabulary", "has no vocabulary", "keeps its tokenizer", tokenizer__ggml__tokens=None),
    says("a vocabulary of numbers", "`tokens` is not a list of", AGAIN, tokenizer__ggml__tokens=[1, 2, 3]),
    says("tokens twice", "3 tokens (1 different)", AGAIN, tokenizer__ggml__tokens=["a", "a", "a"]),
    says("fewer types than tokens", "2 types", AGAIN, tokenizer__ggml__token_type=[1, 1]),
    says("a kind of vocabulary that is not known", "the vocabulary kind `bert` (WordPiece)", "Supported: gpt2", tokenizer__ggml__model="bert"),
    says("a way to cut text that is not known", "cuts text in the way `scissors`", "Known: ", tokenizer__ggml__pre="scissors"),
    says("merges that are not there", "tokenizer", "Token `never`", AGAIN, tokenizer__ggml__merges=["never seen"]),
    Case("a tensor is missing", renamed("blk.1.ffn_up.weight", "blk.1.ffn_xx.weight"), ("base.gguf: the weight `model.layers.1.mlp.up_proj.weight` is missing", "another model's"), TRAIN),
]  # fmt: skip
