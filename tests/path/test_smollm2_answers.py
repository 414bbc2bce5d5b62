"""The real model says what transformers says: 20 prompts, float32, token by token."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

from lorimer.generate.model import load
from path.oracle import quiet

ASKED = (
    *("Say hello.", "What is 7 plus 8?", "Name a colour.", "Write a haiku about rain.", "Translate cat."),
    *(
        "turn on the kitchen lights",
        "Why is the sky blue?",
        "List three fruits.",
        "Who wrote Hamlet?",
        "€5?",
    ),
    *("def add(a, b):", "Explain recursion to a child.", "What day follows Monday?", "Rhyme with moon."),
    *(
        "Give me a JSON object with a name.",
        "Is water wet?",
        "Sum up: the cat sat on the mat.",
        "Count to 5.",
    ),
    *("日本の首都は?", "Capital of France?"),
)
TOKENS = 12


def test_greedy_text_equals_transformers(smollm2: Path) -> None:
    ours = load(smollm2, dtype="fp32", threads=1)
    where = {"pretrained_model_name_or_path": str(smollm2.parent), "gguf_file": smollm2.name}
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    answers = ours.generate(list(ASKED), max_new_tokens=TOKENS)
    assert len(answers) == 20
    for asked, answer in zip(ASKED, answers, strict=True):
        prompt = torch.tensor([ours.prompt_ids(asked)])
        with torch.no_grad():
            found = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=ours.eos_ids,
                pad_token_id=0,
            )
        tokens = [token for token in found[0, prompt.shape[1] :].tolist() if token not in ours.eos_ids]
        assert answer == ours.tokenizer.decode(tokens), asked
