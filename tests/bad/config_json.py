# ruff: noqa: E501  (tables)
"""config.json and generation_config.json of a base."""

from __future__ import annotations

from typing import Any

from bad.case import Case, change, gone, put

FILE = "base/config.json"
CHECK = "Check config.json against the model's original."


def says(what: str, *words: str, **values: Any) -> Case:
    return Case(what, change(FILE, **values), words)


def text(what: str, content: str | bytes, *words: str) -> Case:
    return Case(what, put(FILE, content), ("base/config.json: ", *words))


CASES = [
    # the file
    Case("there is none", gone(FILE), ("base: config.json is missing", "Hugging Face layout")),
    text("an empty file", "", "this is not JSON", "line 1", "Copy"),
    text("a list", "[]", "this should be a JSON object", "Copy"),
    text("half of it", '{"model_type": "llama", "hidden', "this is not JSON", "line 1 column 25", "Copy"),
    text("a web page", "<html><body>Sign in</body></html>", "this is not JSON", "Copy"),
    text("UTF-16", '{"model_type": "llama"}'.encode("utf-16"), "cannot be read", "Copy"),
    text("brackets without end", '{"a": ' + "[" * 100_000, "this is not JSON", "Copy"),
    text("half of an emoji", '{"model_type": "\\ud83d"}', "this is not JSON", "Copy"),
    text("a number of 5,000 digits", '{"vocab_size": ' + "9" * 5000 + "}", "this is not JSON", "Copy"),
    text("a key twice", '{"model_type": "llama", "model_type": "gpt2"}', "`model_type` is there twice", "Copy"),
    # the architecture
    says("an architecture that is not known", "the architecture `lama` is not known", "Did you mean `llama`", model_type="lama"),
    says("no architecture", "does not say `model_type`", CHECK, model_type=...),
    says("an architecture that is a number", "`7`", "lorimer's own: llama", model_type=7),
    says("code of its own for an unknown architecture", "the architecture `my_model` is not known", "which is never run",
         model_type="my_model", auto_map={"AutoModelForCausalLM": "modeling.Canary"}, trust_remote_code=True),
    says("an activation that is not known", "the activation `swoosh` is not known", "silu", hidden_act="swoosh"),
    says("a rope scaling that is not known", "the rope scaling `spiral` is not known", "llama3", rope_parameters={"rope_type": "spiral"}),
    says("a rope scaling without its factor", "the rope scaling `linear` does not say `factor`", CHECK, rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
    says("a rope scaling that is text", "`rope_scaling` is 'linear'", CHECK, rope_scaling="linear"),
    # sizes
    says("no vocabulary size", "`vocab_size` is missing", CHECK, vocab_size=...),
    says("a size in quotes", "`hidden_size` is '36'", CHECK, hidden_size="36"),
    says("a size that is a list", "`num_hidden_layers` is [3]", CHECK, num_hidden_layers=[3]),
    says("a size of true", "`hidden_size` is True", CHECK, hidden_size=True),
    says("a fraction for a size", "`hidden_size` is 36.5", CHECK, hidden_size=36.5),
    says("no layers", "`num_hidden_layers` is 0", CHECK, num_hidden_layers=0),
    says("no heads", "`num_attention_heads` is 0", CHECK, num_attention_heads=0),
    says("negative heads", "`num_key_value_heads` is -1", CHECK, num_key_value_heads=-1),
    says("a billion layers", "`num_hidden_layers` is 1000000000", CHECK, num_hidden_layers=10**9),
    says("a vocabulary larger than any memory", "`vocab_size` is 99999999999", CHECK, vocab_size=99999999999),
    says("heads that cannot be shared evenly", "6 attention heads cannot share 4 key/value heads", CHECK, num_key_value_heads=4),
    says("a head of another width", "[60, 36] (wanted: [54, 36])", "do not belong together", head_dim=9),
    says("a norm of text", "`rms_norm_eps` is 'small'", CHECK, rms_norm_eps="small"),
    says("a norm of NaN", "`rms_norm_eps` is nan", CHECK, rms_norm_eps=float("nan")),
    says("a negative base of the rope", "`rope_theta` is -1.0", CHECK, rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
    # against the weights and the tokenizer
    says("more layers than the weights", "are missing", "its config is another model's", num_hidden_layers=4),
    says("fewer layers than the weights", "has no place for", "number of layers", num_hidden_layers=2),
    says("another width than the weights", "[259, 36] (wanted: [259, 40])", "do not belong together", hidden_size=40),
    says("another vocabulary than the weights", "[259, 36] (wanted: [260, 36])", "do not belong together", vocab_size=260),
    says("a head said to be the embedding, and it is not", "head and embedding are one", "tie_word_embeddings: false", tie_word_embeddings=True),
    says("biases that the weights do not have", "q_proj.bias", "are missing", "its config is another model's", attention_bias=True),
    Case("an end token that is text", put("base/generation_config.json", '{"eos_token_id": "end"}'),
         ("base: eos_token_id is 'end' (wanted: ids)", "Check config.json and generation_config.json")),
]  # fmt: skip
