"""A row as the model sees it: its text in stretches, and which of them are trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from lorimer.data.template import Example
from lorimer.data.tokenizer import Tokenizer

# Control characters would act on the terminal; their pictures (U+2400 on) do not.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens that are all trained or all not, all control tokens or all not."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    control: bool


def stretches(example: Example, tokenizer: Tokenizer) -> list[Stretch]:
    """The row's tokens in order, cut where being trained or being a control token changes."""
    marks = [
        (bool(trained), tokenizer.is_special(int(number)))
        for number, trained in zip(example.ids, example.trained, strict=True)
    ]
    found: list[Stretch] = []
    ids = [int(number) for number in example.ids]
    before = start = end = 0
    for (trained, control), group in groupby(marks):
        before, start, end = start, end, end + len(list(group))
        # Decoded with the stretch before it: by itself it could lose the space it begins with.
        known = tokenizer.decode(ids[before:start], skip_special=False)
        text = tokenizer.decode(ids[before:end], skip_special=False)[len(known) :]
        found.append(Stretch(text, tuple(ids[start:end]), trained, control))
    return found


def visible(text: str) -> str:
    """Text that cannot act on a terminal."""
    return text.translate(PICTURES)
