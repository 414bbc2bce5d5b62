# ruff: noqa: E501  (tables)
"""Adapter folders: adapter_config.json, the weights, lorimer.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.case import Case, Make, both, change, gone, put

FOLDER = "adapter"
CONFIG, WEIGHTS, OURS = (
    f"{FOLDER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "lorimer.json")
)
ANSWER = ("generate", FOLDER, "a", "--max-tokens", "1")
MERGE = ("merge", FOLDER, "--out", "merged")
EXPORT = ("export", FOLDER, "--to", "gguf-lora", "--out", "x.gguf")
SHOW = ("show", FOLDER)
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def says(what: str, *words: str, **values: Any) -> Case:
    return Case(what, change(CONFIG, **values), ("adapter_config.json", *words), ANSWER)


def ours(what: str, *words: str, **values: Any) -> Case:
    return Case(what, change(OURS, **values), ("adapter", *words), ANSWER)


def weights(
    what: str, do: Callable[[dict[str, Any]], Any], *words: str, command: tuple[str, ...] = ANSWER
) -> Case:
    return Case(what, tensors(do), ("adapter", *words), command)


def tensors(do: Callable[[dict[str, Any]], Any]) -> Make:
    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / WEIGHTS)
        do(found)
        save_file(found, folder / WEIGHTS)

    return make


def pickled(folder: Path) -> None:
    """A pickle that would leave a file called canary if it were read."""
    (folder / WEIGHTS).unlink()
    (folder / "adapter/adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")


CASES = [
    # the files
    Case("no settings", gone(CONFIG), ("adapter: config.json is missing", "Hugging Face layout"), ANSWER),
    Case("no weights", gone(WEIGHTS), ("adapter: adapter_model.safetensors is missing", "Copy the folder again"), ANSWER),
    Case("weights in a pickle", pickled, ("adapter_model.bin is a pickle and is not read", "Save it as safetensors"), ANSWER),
    Case("settings that are cut off", put(CONFIG, '{"r": 2,'), ("adapter_config.json: ", "cannot be read", "Copy"), ANSWER),
    Case("settings that are a list", put(CONFIG, "[]"), ("adapter_config.json: ", "should be a JSON object", "Copy"), ANSWER),
    Case("settings in UTF-16", put(CONFIG, '{"r": 2}'.encode("utf-16")), ("adapter_config.json: ", "cannot be read", "Copy"), SHOW),
    Case("brackets without end", put(CONFIG, "[" * 100_000), ("adapter_config.json: ", "cannot be read", "Copy"), ANSWER),
    Case("a manifest that is text", put(OURS, '"x"'), ("lorimer.json: ", "should be a JSON object", "Copy"), ANSWER),
    Case("weights cut short", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), ("adapter_model.safetensors: ", "damaged", "again"), MERGE),
    Case("weights that are empty", put(WEIGHTS, ""), ("adapter_model.safetensors: ", "damaged", "again"), EXPORT),
    # other kinds
    says("prefix tuning", "of the kind PREFIX_TUNING (wanted: LORA)", "train a LoRA adapter", peft_type="PREFIX_TUNING"),
    says("DoRA", "use_dora, which is not supported", "Merge it with the tool that made it", use_dora=True),
    says("tokens of its own without their rows", "`trainable_token_indices` names tokens", "against the adapter's original", trainable_token_indices=[1, 2]),
    says("a kind that is a number", "of the kind 5 (wanted: LORA)", "train a LoRA adapter", peft_type=5),
    # settings
    says("no rank", "`r` is None", "against the adapter's original", r=...),
    says("a rank that is text", "`r` is 'two'", "against the adapter's original", r="two"),
    says("no alpha", "does not say `lora_alpha`", "Check it", lora_alpha=...),
    says("an alpha that is text", "`lora_alpha`", "is 'four' (wanted: a number)", "Check it", lora_alpha="four"),
    says("an alpha of infinity", "`lora_alpha`", "is inf (wanted: a number)", "Check it", lora_alpha=float("inf")),
    says("a dropout that is a list", "`lora_dropout`", "wanted: a number", "Check it", lora_dropout=[0.1]),
    says("patterns that are a list", "`alpha_pattern`", "should be a JSON object", "Check it", alpha_pattern=["q_proj"]),
    says("a pattern that is none", "`alpha_pattern`", "has no pattern: '('", "Check it", alpha_pattern={"(": 4}),
    says("a pattern that never ends", "alpha_pattern", "could take for ever", "Name the modules", alpha_pattern={"(.*.*.*)*x": 4}),
    says("experts that are a number", "`target_parameters` is 3", "Check it", target_parameters=3),
    says("a bias that is not known", "`bias` is 'some' (wanted: none, all or lora_only)", "Check it", bias="some"),
    # weights
    weights("no tensors", lambda t: t.clear(), "adapter_model.safetensors", "it holds no tensors", "save_pretrained"),
    weights("a name that PEFT does not write", lambda t: t.update({"x": t[A].clone()}), "`x` is not a name that PEFT writes", "save_pretrained"),
    weights("NaN", lambda t: t[A].fill_(float("nan")), "q_proj.lora_A.weight` holds NaN or infinity", "Copy it again"),
    weights("infinity", lambda t: t[B].fill_(float("inf")), "q_proj.lora_B.weight` holds NaN or infinity", "Copy it again", command=EXPORT),
    weights("only one of two factors", lambda t: t.pop(B), "lora_B.weight` is missing", "It says that it was trained on"),
    weights("factors of different rank", lambda t: t.update({B: t[B][:, :1].contiguous()}), "has the shape [60, 1] (wanted: [60, 2])", "It says that it was trained on"),
    weights("a factor of another width", lambda t: t.update({A: t[A][:, :9].contiguous()}), "has the shape [2, 9] (wanted: [2, 36])", "It says that it was trained on", command=MERGE),
    weights("a factor of three dimensions", lambda t: t.update({A: t[A][None].contiguous()}), "q_proj.weight` has no place or another shape", "It says that it was trained on", command=EXPORT),
    weights("a rank of 0", lambda t: t.update({A: t[A][:0].contiguous(), B: t[B][:, :0].contiguous()}), "q_proj", "a rank of 0", "Copy or download"),
    weights("whole numbers", lambda t: t.update({A: t[A].int()}), "q_proj.lora_A.weight` is I32", "Copy or download"),
    weights("a module that the base does not have", lambda t: t.update({A.replace("q_proj", "z_proj"): t.pop(A), B.replace("q_proj", "z_proj"): t.pop(B)}),
            "no module `model.layers.0.self_attn.z_proj`", "It says that it was trained on"),
    weights("a layer that the base does not have", lambda t: t.update({A.replace(".0.", ".9.", 1): t.pop(A), B.replace(".0.", ".9.", 1): t.pop(B)}),
            "no module `model.layers.9.self_attn.q_proj`", "It says that it was trained on", command=MERGE),
    # the base
    ours("trained on another base", "was trained on another base", "Use the base", base__fingerprint="0" * 64),
    ours("a fingerprint that is a number", "lorimer.json: `base.fingerprint` is 7", "Copy or download", base__fingerprint=7),
    ours("a base that is a list", "lorimer.json: `base` is []", "Copy or download", base=[]),
    ours("a storage that is not known", "stored as", "--quant", base__quant={"kind": "nf9"}),
    Case("a base that is gone", both(change(CONFIG, base_model_name_or_path="gone/away"), change(OURS, base__path="gone/away")),
         ("there is no base", "gone/away", "lorimer pull"), ANSWER),
    Case("no base said", both(change(CONFIG, base_model_name_or_path=None), put(OURS, "{}")), ("does not say which base", "Add --base"), ANSWER),
    Case("a base that is a number", both(change(CONFIG, base_model_name_or_path=5), put(OURS, "{}")), ("adapter_config.json: `base_model_name_or_path` is 5", "Check it"), MERGE),
    Case("a template that is broken", put("adapter/chat_template.jinja", "{% if %}"), ("chat_template.jinja: the chat template is not valid, line 1", "Mend the template"), ANSWER),
    Case("a template in Latin-1", put("adapter/chat_template.jinja", "{{ 'é' }}".encode("latin-1")), ("chat_template.jinja: the chat template cannot be read", "save it as UTF-8"), ANSWER),
]  # fmt: skip
