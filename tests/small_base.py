"""A base of a few kilobytes: one token for each byte, ChatML, and no weights to speak of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "add_bos_token": False}


def small_tokenizer_json() -> str:
    vocab = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<|im_start|>", "<|im_end|>"])
    return str(tokenizer.to_str())


def write_small_base(folder: Path, template: str | None = CHATML) -> Path:
    """A folder that opens as a base, with its tokenizer and chat template."""
    folder.mkdir()
    config = {"model_type": "llama", "eos_token_id": 258}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(small_tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


def write_chat_base(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A base that can be trained: the tokenizer and template above, and a random tiny model."""
    from tiny import make_tiny

    settings = {"vocab_size": 259, "max_position_embeddings": 512, "eos_token_id": 258} | changes
    make_tiny(folder, family, **settings)
    (folder / "tokenizer.json").write_text(small_tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


def write_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """Chat rows of different lengths; the answer is the question's words turned round."""
    random = np.random.Generator(np.random.PCG64(seed))
    lines = []
    for _ in range(count):
        words = [
            "".join(random.choice(list("abcde"), random.integers(1, 6)))
            for _ in range(random.integers(1, 6))
        ]
        asked, answer = " ".join(words), " ".join(reversed(words))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path
