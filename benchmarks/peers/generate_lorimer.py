"""Greedy decoding by lorimer, with no token that ends an answer."""

from __future__ import annotations

import lorimer
from lorimer.generate.engine import generate_ids
from lorimer.generate.sampling import Sampling

from .generation_job import Ids, read_job, run


def main() -> None:
    job = read_job()
    model = lorimer.load(job.base, dtype=job.dtype, threads=job.threads)

    def generate(prompts: Ids) -> Ids:
        answers = generate_ids(
            model.decoder,
            prompts,
            max_new_tokens=job.new_tokens,
            sampling=Sampling(),
            eos_ids=[],
            batch_size=len(prompts),
        )
        return [answer.tokens for answer in answers]

    run(job, generate)


if __name__ == "__main__":
    main()
