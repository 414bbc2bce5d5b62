"""A folder or a GGUF file as a base: the same words from both, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gguf_files import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, VOCAB, write_model
from lorimer.bases.gguf_names import hugging_face_name
from lorimer.bases.open import open_base
from lorimer.errors import BaseError

NAMES = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
    ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
    ("blk.3.attn_k.bias", "model.layers.3.self_attn.k_proj.bias"),
    ("blk.31.attn_v.weight", "model.layers.31.self_attn.v_proj.weight"),
    ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight"),
    ("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
    ("blk.3.attn_k_norm.weight", "model.layers.3.self_attn.k_norm.weight"),
    ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
    ("blk.3.ffn_gate.weight", "model.layers.3.mlp.gate_proj.weight"),
    ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
    ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
    ("rope_freqs.weight", "rope_freqs.weight"),
    ("blk.3.something.weight", "blk.3.something.weight"),
]


@pytest.mark.parametrize(("gguf", "hugging_face"), NAMES)
def test_names_of_tensors(gguf: str, hugging_face: str) -> None:
    assert hugging_face_name(gguf) == hugging_face


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ({}, [2]),
        ({"eot": 7}, [2, 7]),
        ({"eot": 2}, [2]),
        ({"eot": 7, "eom": 9}, [2, 7, 9]),
        ({"eot": "seven"}, [2]),
    ],
)
def test_a_gguf_files_end_tokens(tmp_path: Path, named: dict[str, Any], wanted: list[int]) -> None:
    metadata = {f"tokenizer.ggml.{role}_token_id": value for role, value in named.items()}
    metadata["tokenizer.ggml.padding_token_id"] = 5
    base = open_base(write_model(tmp_path / "model.gguf", metadata=metadata))
    assert base.eos_token_ids() == wanted
    assert base.config["pad_token_id"] == 5


def test_a_gguf_file_in_the_words_of_config_json(tmp_path: Path) -> None:
    base = open_base(write_model(tmp_path / "model.gguf", "qwen2"))
    assert base.kind == "gguf"
    wanted = {
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "rms_norm_eps": float(np.float32(1e-5)),
        "max_position_embeddings": 512,
        "rope_theta": 50_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "license": "mit",
    }
    assert {key: base.config[key] for key in wanted} == wanted
    assert base.eos_token_ids() == [2]
    assert base.chat_template == "{{ messages }}"
    assert base.gguf_metadata is not None
    assert base.gguf_metadata["tokenizer.ggml.tokens"][39] == "t39"
    embedding = base.tensors["model.embed_tokens.weight"]
    assert (embedding.dtype, embedding.shape) == ("Q8_0", (VOCAB, HIDDEN))
    assert base.raw("model.embed_tokens.weight").nbytes == VOCAB * HIDDEN // 32 * 34
    square, inner, kv = HIDDEN * HIDDEN, HIDDEN * INNER, HIDDEN * KV_HEADS * HEAD
    assert base.parameters == VOCAB * HIDDEN + 2 * square + 2 * kv + 3 * inner + 3 * HIDDEN


def config_with(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return open_base(write_model(tmp_path / "model.gguf", **changes)).config


def test_a_head_of_its_own_and_biases_show_in_the_config(tmp_path: Path) -> None:
    extra = {
        "output.weight": np.ones((VOCAB, HIDDEN), np.float32),
        "blk.0.attn_q.bias": np.ones(HIDDEN, "f4"),
    }
    config = config_with(tmp_path, extra=extra)
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True


# Metadata (without the architecture's prefix) -> what the config then says.
VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"attention.key_length": 96}, {"head_dim": 96}),
    ({"rope.dimension_count": 32}, {"head_dim": 32}),
    ({"attention.head_count_kv": None}, {"num_key_value_heads": HEADS}),
    ({"rope.freq_base": None}, {"rope_theta": 10_000.0}),
    ({"attention.sliding_window": 128}, {"sliding_window": 128}),
    ({"rope.scaling.type": "none"}, {"rope_scaling": None}),
    (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.attn_factor": 0.5,
        },
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.5,
            }
        },
    ),
]


@pytest.mark.parametrize(("given", "wanted"), VARIANTS)
def test_metadata_in_the_words_of_config_json(
    tmp_path: Path, given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    metadata = {f"llama.{key}": value for key, value in given.items()}
    # Without the weights that would have to agree with these sizes.
    config = config_with(tmp_path, metadata=metadata, without=["blk.0.attn_q", "blk.0.attn_k"])
    assert {key: config[key] for key in wanted} == wanted


def test_llama_3_divisors_are_kept_and_put_into_the_config(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, HEAD // 2).astype(np.float32)
    base = open_base(write_model(tmp_path / "model.gguf", extra={"rope_freqs.weight": divisors}))
    assert base.config["rope_scaling"]["short_factor"] == divisors.tolist()
    assert base.config["rope_scaling"]["long_factor"] == divisors.tolist()
    assert base.raw("rope_freqs.weight").view("<f4").tolist() == divisors.tolist()


# What the GGUF metadata lacks or has wrong; 0 and inf in the divisions and casts.
UNUSABLE: list[dict[str, Any]] = [
    {"llama.attention.head_count": None},
    {"llama.block_count": "many"},
    {"llama.feed_forward_length": None},
    {"llama.attention.head_count_kv": [1, 2]},
]


@pytest.mark.parametrize("metadata", UNUSABLE)
def test_gguf_metadata_that_does_not_describe_a_model_is_refused(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    with pytest.raises(BaseError, match="does not describe a language model that can be used"):
        config_with(tmp_path, metadata=metadata)


def test_a_gguf_file_without_an_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"model.embed_tokens.weight' is missing"):
        config_with(tmp_path, without=["token_embd"])


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {"llama.attention.head_count": 0}},
        {"metadata": {"llama.block_count": float("inf")}},
        {"extra": {"rope_freqs.weight": np.ones(HEAD // 2, np.float16)}},
        {"metadata": {"split.count": 2}},
        {"metadata": {"tokenizer.ggml.eos_token_id": "two"}},
    ],
)
def test_gguf_metadata_without_sense_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BaseError):
        open_base(write_model(tmp_path / "model.gguf", **changes)).eos_token_ids()


def test_a_folder_that_holds_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf")
    assert open_base(tmp_path).path == tmp_path / "model.gguf"


CONFIG = {"model_type": "llama", "eos_token_id": 7}


def write(folder: Path, name: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base in Hugging Face layout with one file of weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    write(folder, "config.json", CONFIG)
    save_file({"a": np.arange(4, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> Path:
    """The same in two shards."""
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": np.arange(4, dtype=np.float32)}, folder / names[0])
    save_file({"b": np.ones((2, 2), np.float32)}, folder / names[1])
    write(folder, "model.safetensors.index.json", {"weight_map": dict(zip("ab", names, strict=True))})
    return folder


def test_a_folder_with_one_file_and_with_shards(folder: Path) -> None:
    base = open_base(folder)
    assert (base.kind, base.config, base.tensors["a"].shape) == ("safetensors", CONFIG, (4,))
    assert base.tokenizer_json is None
    assert (base.tokenizer_config, base.generation_config, base.chat_template) == ({}, {}, None)
    base = open_base(shard(folder))
    assert sorted(base.tensors) == ["a", "b"]
    assert base.raw("b").view("<f4").tolist() == [1, 1, 1, 1]
    assert (base.parameters, base.nbytes) == (8, 32)


def test_shards_may_be_links_as_hub_caches_keep_them(folder: Path, tmp_path: Path) -> None:
    blob = shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)
    assert open_base(folder).raw("a").view("<f4").tolist() == [0, 1, 2, 3]


RAG = {"name": "rag", "template": "r"}
TEMPLATES = [
    ({}, None, None),
    ({"chat_template": "plain"}, None, "plain"),
    (
        {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]},
        None,
        "d",
    ),
    ({"chat_template": [{"name": "rag", "template": "r"}]}, None, None),
    ({"chat_template": None}, None, None),
    ({"chat_template": 5}, "from its own file", "from its own file"),
    ({"chat_template": "plain"}, "from its own file", "from its own file"),
]


@pytest.mark.parametrize(("config", "file", "wanted"), TEMPLATES)
def test_where_the_chat_template_comes_from(
    folder: Path, config: dict[str, Any], file: str | None, wanted: str | None
) -> None:
    write(folder, "tokenizer_config.json", config)
    if file is not None:
        write(folder, "chat_template.jinja", file)
    assert open_base(folder).chat_template == wanted


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "`chat_template` is 5 (wanted: a text, or a list"),
        ("tokenizer_config.json", {"eos_token": 2}, "`eos_token` is 2 (wanted: a text)"),
        ("special_tokens_map.json", {"pad_token": []}, "`pad_token` is [] (wanted: a text)"),
        ("tokenizer_config.json", {"unk_token": {"content": 1}}, '`unk_token` is {"content": 1} (wanted'),
        ("tokenizer_config.json", {"add_bos_token": 1}, "`add_bos_token` is 1 (wanted: true or false)"),
        (
            "tokenizer_config.json",
            {"add_eos_token": {"content": "a"}},
            '`add_eos_token` is {"content": "a"}',
        ),
    ],
)
def test_settings_of_a_tokenizer_of_another_kind_are_refused(
    folder: Path, file: str, settings: dict[str, Any], said: str
) -> None:
    write(folder, file, settings)
    with pytest.raises(BaseError) as caught:
        open_base(folder)
    assert caught.value.problem.startswith(said)
    assert caught.value.path == str(folder / file)


def test_a_token_is_a_text_or_holds_one(folder: Path) -> None:
    tokens = {"bos_token": "a", "eos_token": {"content": "b"}, "pad_token": None, "add_bos_token": False}
    write(folder, "tokenizer_config.json", tokens)
    assert open_base(folder).tokenizer_config == tokens


ENDS = [
    ({"eos_token_id": 7}, None, [7]),
    ({"eos_token_id": [7, 8]}, {}, [7, 8]),
    ({"eos_token_id": 7}, {"eos_token_id": [1, 0]}, [1, 0]),
    ({"eos_token_id": 7}, {"eos_token_id": 0}, [0]),
    ({"eos_token_id": None}, {"eos_token_id": None}, []),
]


@pytest.mark.parametrize(("config", "generation", "wanted"), ENDS)
def test_where_the_ends_of_an_answer_come_from(
    folder: Path, config: dict[str, Any], generation: dict[str, Any] | None, wanted: list[int]
) -> None:
    write(folder, "config.json", config)
    if generation is not None:
        write(folder, "generation_config.json", generation)
    assert open_base(folder).eos_token_ids() == wanted


@pytest.mark.trap("S2")
def test_keys_that_would_run_code_or_switch_internals_are_not_there(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit(9)", encoding="utf-8")
    evil = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "trust_remote_code": True,
        "_attn_implementation": "elsewhere/kernel",
        "_attn_implementation_internal": "elsewhere/kernel",
    }
    write(folder, "config.json", CONFIG | evil)
    write(folder, "tokenizer_config.json", evil)
    base = open_base(folder)
    assert base.config == CONFIG


@pytest.mark.trap("S1")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_and_never_read(folder: Path, name: str) -> None:
    """The pickle would leave a mark if anything loaded it."""
    mark = folder / "was-read"
    code = f"cposix\nsystem\n(Vtouch {mark}\ntR.".encode()
    (folder / "model.safetensors").rename(folder / name)
    (folder / name).write_bytes(code)
    with pytest.raises(BaseError, match=f"{name}, a pickle, which can run code"):
        open_base(folder)
    write(folder, "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(BaseError, match=f"the index names `{name}`"):
        open_base(folder)
    shutil.copy(folder / name, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseError, match="damaged"):
        open_base(folder)
    assert not mark.exists()


OUTSIDE = [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "sub/model.safetensors",
    "..\\secret.safetensors/",
    "",
    "..",
]


@pytest.mark.trap("S6")
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_shard_outside_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "sub").mkdir()
    shutil.move(folder / "model.safetensors", folder / "sub/model.safetensors")
    write(folder, "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(BaseError, match="the index names"):
        open_base(folder)


def broken(name: str, value: object) -> Any:
    return lambda folder: write(folder, name, value)


def removed(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


FOLDERS: dict[str, tuple[Any, str]] = {
    "no config": (removed("config.json"), "config.json is missing"),
    "config is not JSON": (broken("config.json", "{"), r"config.json: this is not JSON: .*line 1"),
    "config is a list": (broken("config.json", []), "config.json: this should be a JSON object"),
    "brackets without end": (broken("config.json", "[" * 99_999), "config.json: this is not JSON"),
    "no weights": (removed("model.safetensors"), "model.safetensors is missing"),
    "weights cut short": (broken("model.safetensors", "short"), "damaged or cut short"),
    "a shard is missing": (
        lambda folder: (shard(folder) / "model-00002-of-00002.safetensors").unlink(),
        "the shard model-00002-of-00002.safetensors that the index names is missing",
    ),
    "generation config is text": (
        broken("generation_config.json", '"x"'),
        "generation_config.json: this should be a JSON object",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_not_whole_is_refused_by_name(folder: Path, what: str) -> None:
    change, words = FOLDERS[what]
    change(folder)
    with pytest.raises(BaseError, match=words):
        open_base(folder)


def test_a_config_that_is_not_utf_8_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16"))
    with pytest.raises(BaseError, match=r"config.json: the file cannot be read: .*utf-8"):
        open_base(folder)


def test_half_of_a_surrogate_pair_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}', encoding="utf-8")
    with pytest.raises(BaseError, match="surrogates not allowed"):
        open_base(folder)


def test_a_tokenizer_of_absurd_size_is_not_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(BaseError, match="1,000,000,000,000 bytes is too large"):
        open_base(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.safetensors.index.json", {"weight_map": ["a"]}),
        ("model.safetensors.index.json", {"weight_map": 5}),
        ("model.safetensors.index.json", {"weight_map": {"a": ["b"]}}),
        ("generation_config.json", {"eos_token_id": "two"}),
    ],
)
def test_json_of_the_wrong_shape_is_refused(folder: Path, name: str, value: object) -> None:
    write(shard(folder), name, value)
    with pytest.raises(BaseError):
        open_base(folder).eos_token_ids()


def test_a_list_of_templates_that_are_none_is_no_template(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": ["x"]})
    assert open_base(folder).chat_template is None


def test_one_whole_file_goes_before_an_index_that_was_left_behind(folder: Path) -> None:
    write(folder, "model.safetensors.index.json", {"weight_map": {"a": "gone.safetensors"}})
    assert list(open_base(folder).tensors) == ["a"]


def test_what_is_neither_folder_nor_gguf_file_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BaseError, match="there is no such file or folder"):
        open_base(tmp_path / "none")
    with pytest.raises(BaseError, match="not a GGUF file"):
        open_base(folder / "model.safetensors")


# fingerprint


def test_a_fingerprint_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert open_base(folder).fingerprint() == open_base(tmp_path / "copy").fingerprint()
    path = write_model(tmp_path / "a.gguf")
    shutil.copy(path, tmp_path / "b.gguf")
    assert open_base(path).fingerprint() == open_base(tmp_path / "b.gguf").fingerprint()
    assert len(open_base(path).fingerprint()) == 64


def fingerprint_of(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    save_file(tensors, folder / "model.safetensors")
    return open_base(folder).fingerprint()


def test_a_fingerprint_changes_with_bytes_shape_type_or_name(folder: Path) -> None:
    """Bytes of the beginning, the middle and the end count, in a tensor larger than all three."""
    value = np.zeros(40_000, np.float32)
    seen = {fingerprint_of(folder, {"a": value})}
    for place in (0, 1023, 20_000, 39_999):
        changed = value.copy()
        changed[place] = 1
        seen.add(fingerprint_of(folder, {"a": changed}))
    seen.add(fingerprint_of(folder, {"a": value.reshape(200, 200)}))
    seen.add(fingerprint_of(folder, {"a": value.view(np.int32)}))
    seen.add(fingerprint_of(folder, {"b": value}))
    assert len(seen) == 8


def test_a_fingerprint_changes_with_what_the_config_computes(folder: Path) -> None:
    before = open_base(folder).fingerprint()
    write(folder, "config.json", CONFIG | {"rope_theta": 123.0})
    assert open_base(folder).fingerprint() != before


def test_a_fingerprint_ignores_what_does_not_compute(folder: Path) -> None:
    before = open_base(folder).fingerprint()
    write(folder, "config.json", CONFIG | {"transformers_version": "9", "_name_or_path": "elsewhere"})
    assert open_base(folder).fingerprint() == before


# The real base


def test_smollm2(smollm2: Path) -> None:
    base = open_base(smollm2)
    wanted = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    }
    assert {key: base.config[key] for key in wanted} == wanted
    assert base.parameters == 134_515_008
    assert len(base.tensors) == 272
    assert base.eos_token_ids() == [2]
    assert "<|im_start|>" in (base.chat_template or "")
