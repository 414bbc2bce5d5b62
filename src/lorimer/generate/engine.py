"""Prompts as ids -> answers as ids, side by side.

Prompts are computed as one packed batch, without padding; then every row gets one token at a time.
A row's keys and values never depend on its neighbours, so in float32 a batch gives what each prompt
gives alone. In bf16 the rounding of a matrix product depends on its number of rows, and two tokens
that are nearly as likely can change places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lorimer.errors import UserError
from lorimer.generate.sampling import Sampling, choose, row_key
from lorimer.model.decoder import Decoder

# Prompt tokens computed at once, to bound memory; and by how much a cache grows.
PROMPT_TOKENS = 4096
CACHE_STEP = 64


@dataclass(slots=True)
class Answer:
    """One row while it is generated: `tokens` is the answer so far, `ended` why it stopped."""

    number: int
    prompt: list[int]
    key: bytes
    tokens: list[int] = field(default_factory=list)
    ended: str | None = None


def generate_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int],
    stop: Callable[[list[int]], bool] = lambda tokens: False,
    batch_size: int = 32,
    on_token: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """An answer for each prompt, in order. The end-of-turn token is not part of an answer.

    `stop` sees the answer so far and may end it. Raises UserError for an empty prompt, one that
    leaves the model's context no room, or no room for an answer.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens} (wanted: 1 or more)")
    seen: Counter[bytes] = Counter()
    answers = []
    for number, prompt in enumerate(prompts):
        _check_prompt(decoder, prompt)
        plain = row_key(sampling.seed, prompt, 0)
        key = plain if not seen[plain] else row_key(sampling.seed, prompt, seen[plain])
        seen[plain] += 1
        answers.append(Answer(number, list(prompt), key))
    # Neighbours in length share a batch: fewer masked positions, and rows that end together.
    order = sorted(answers, key=lambda answer: (len(answer.prompt), answer.number))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = _Batch(decoder, order[start : start + batch_size], max_new_tokens)
            batch.run(sampling, frozenset(eos_ids), stop, on_token)
    return answers


def _check_prompt(decoder: Decoder, prompt: Sequence[int]) -> None:
    room = decoder.spec.max_positions
    if not prompt:
        raise UserError("the prompt is empty", fix="Give at least one character.")
    if len(prompt) >= room:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens and the model's context holds {room:,}",
            fix="Shorten the prompt.",
        )


class _Batch:
    """Rows generated together; finished rows leave once they are the half of it."""

    def __init__(self, decoder: Decoder, answers: list[Answer], max_new_tokens: int) -> None:
        self.decoder, self.rows = decoder, answers
        longest = max(len(answer.prompt) for answer in answers)
        self.limit = max_new_tokens
        self.cache = decoder.new_cache(len(answers), longest + CACHE_STEP)

    def run(
        self,
        sampling: Sampling,
        eos_ids: frozenset[int],
        stop: Callable[[list[int]], bool],
        on_token: Callable[[Answer], None],
    ) -> None:
        logits_BV = self._prompt_logits()
        while True:
            self._take(choose(*self._choice(logits_BV, sampling)), eos_ids, stop, on_token)
            open_rows = self._open()
            if not open_rows:
                return
            if 2 * len(open_rows) <= len(self.rows):
                self.cache.keep(open_rows)
                self.rows = [self.rows[i] for i in open_rows]
            if max(self.cache.lengths) + 1 > self.cache.capacity:
                self.cache.grow(self.cache.capacity + max(CACHE_STEP, self.cache.capacity // 2))
            # An ended row that is still here goes on with its last token; nobody reads what comes.
            ids = [answer.tokens[-1] if answer.tokens else answer.prompt[-1] for answer in self.rows]
            tokens_B = torch.tensor(ids, device=self.decoder.device)
            logits_BV = self.decoder.logits(self.decoder.next_hidden(tokens_B, self.cache))
            if anew := [i for i in self._open() if self.decoder.rope.turns_anew(self.cache.lengths[i])]:
                logits_BV[anew] = self._prompt_part(anew)

    def _open(self) -> list[int]:
        return [i for i, answer in enumerate(self.rows) if answer.ended is None]

    def _prompt_logits(self) -> torch.Tensor:
        """Fill the cache with the prompts; the logits after each prompt's last token."""
        parts, members = [], list[int]()
        for i, answer in enumerate(self.rows):
            members.append(i)
            tokens = sum(len(self.rows[m].prompt) for m in members)
            last = i + 1 == len(self.rows)
            if last or tokens + len(answer.prompt) > PROMPT_TOKENS:
                parts.append(self._prompt_part(members))
                members = []
        return torch.cat(parts)

    def _prompt_part(self, members: list[int]) -> torch.Tensor:
        """Compute these rows from their first token on, which fills the cache; the logits after each."""
        prompts = [self.rows[m].prompt + self.rows[m].tokens for m in members]
        lengths = [len(prompt) for prompt in prompts]
        device = self.decoder.device
        ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        ends_M = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden_MH = self.decoder.hidden(ids_T, lengths, cache=self.cache, cache_rows=members, only_M=ends_M)
        return self.decoder.logits(hidden_MH)

    def _choice(
        self, logits_BV: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, Sampling, list[list[int]], list[bytes], list[int]]:
        penalised = sampling.repetition_penalty != 1.0
        seen = [answer.prompt + answer.tokens for answer in self.rows] if penalised else []
        keys = [answer.key for answer in self.rows]
        return logits_BV, sampling, seen, keys, [len(answer.tokens) for answer in self.rows]

    def _take(
        self,
        tokens: list[int],
        eos_ids: frozenset[int],
        stop: Callable[[list[int]], bool],
        on_token: Callable[[Answer], None],
    ) -> None:
        for answer, token in zip(self.rows, tokens, strict=True):
            if answer.ended is not None:
                continue
            if token in eos_ids:
                answer.ended = "eos"
            else:
                answer.tokens.append(token)
                room = self.decoder.spec.max_positions - len(answer.prompt)
                if stop(answer.tokens):
                    answer.ended = "stop"
                elif len(answer.tokens) >= min(self.limit, room):
                    answer.ended = "length"
            on_token(answer)
