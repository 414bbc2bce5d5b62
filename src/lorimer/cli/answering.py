"""What generate and chat share: the options of an answer, and text that is safe for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorimer.generate.model import Settings

MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest tokens that sum to this.")]
TopK = Annotated[int, typer.Option(help="Choose among this many tokens; 0 for all.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 repeats less.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.", show_default=False)
]
System = Annotated[str | None, typer.Option(help="System prompt.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="Another copy of the adapter's base.", show_default=False)]
Quant = Annotated[
    str | None,
    typer.Option(
        help="How the base is stored: none, nf4, fp4, int8 or keep [as it was trained].", show_default=False
    ),
]


def settings(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: list[str] | None,
) -> Settings:
    return {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
