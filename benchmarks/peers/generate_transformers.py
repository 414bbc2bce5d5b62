"""Greedy decoding by transformers' generate, with no token that ends an answer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .generation_job import Ids, read_job, run


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {}
    if job.variant != "transformers":
        options["cache_implementation"] = "static"
    if job.variant == "transformers-compiled":
        model.forward = torch.compile(model.forward)

    def generate(prompts: Ids) -> Ids:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=job.new_tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        answers: Ids = out[:, longest:].tolist()
        return answers

    run(job, generate)


if __name__ == "__main__":
    main()
