"""The real model says what transformers says: 20 prompts, float32, token by token."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

from lorimer.generate.engine import generate_ids
from lorimer.generate.model import load
from lorimer.generate.sampling import Sampling
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
        "Count.",
    ),
    *("日本の首都は?", "Capital of France?"),
)
TOKENS = 12


def test_greedy_text_equals_transformers(smollm2: Path) -> None:
    ours = load(smollm2, dtype="fp32", threads=1)
    where = {"pretrained_model_name_or_path": str(smollm2.parent), "gguf_file": smollm2.name}
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    prompts = [ours.prompt_ids(asked) for asked in ASKED]
    answers = generate_ids(
        ours.decoder, prompts, max_new_tokens=TOKENS, sampling=Sampling(), eos_ids=ours.eos_ids
    )
    assert len(answers) == 20
    for asked, prompt, answer in zip(ASKED, prompts, answers, strict=True):
        said = answer.tokens
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 :]
        # Greedy, token by token: each is the likeliest after all before it, and the end where it ended.
        chosen = logits.argmax(-1).tolist()
        assert chosen[: len(said)] == said, asked
        assert len(said) == TOKENS or chosen[len(said)] in ours.eos_ids, asked
