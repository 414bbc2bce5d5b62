"""What is checked before the first step, on the user's own model and rows, in seconds.

Each check answers one question that a run can get silently wrong. A check that fails stops the run; the
user may skip one by name, and the run's record says so.

Letters: T tokens, M trained positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lorimer.config import RunConfig
from lorimer.data.conversation import Conversation
from lorimer.data.near import near_prompts
from lorimer.data.pack import Pack, split_into_packs
from lorimer.data.prepare import Prepared
from lorimer.data.template import ChatTemplate, Example
from lorimer.errors import BaseError, PreflightError, UserError
from lorimer.generate.model import Model
from lorimer.lora.layers import OWN_ROWS, Adapter
from lorimer.lora.stacked import is_expert, parameter_of
from lorimer.model.load import read_weight
from lorimer.model.loss import pack_loss, pack_losses

# Rows that are computed with, and the most tokens of each: a check takes a second, not a minute.
ROWS, TOKENS = 4, 96
# How far two ways to compute the same may be apart: losses in nats, gradients relative, by type.
LOSS_APART = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
MEAN_APART = {torch.float32: 1e-5, torch.float16: 0.004, torch.bfloat16: 0.02}
GRADIENT_APART = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
# An embedding this much smaller than those of other tokens in use was never trained.
UNTRAINED = 0.02
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Tick:
    """The answer to one check: passed, failed (with what to do), or skipped."""

    name: str
    passed: bool
    text: str
    fix: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        state = "skip" if self.skipped else "ok" if self.passed else "FAIL"
        return f"{state:<5}{self.name:<12}{self.text}"


class _Failed(Exception):
    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.text, self.fix = text, fix


@dataclass
class Subject:
    """What is checked: nothing of it is changed when the checks are through."""

    config: RunConfig
    model: Model
    adapter: Adapter
    data: Prepared
    share: bool
    trim: bool

    @cached_property
    def rows(self) -> list[Example]:
        """A few rows, cut to where their trained tokens begin."""
        chosen = sorted(self.data.train, key=lambda example: len(example.ids))[:ROWS]
        return [_cut(example) for example in (chosen * 2)[: max(2, len(chosen))]]

    def packs(self, *, together: bool, share: bool | None = None) -> list[Pack]:
        share = self.share if share is None else share
        return split_into_packs(self.rows, 1 << 20, together=together, share=share, trim=self.trim)

    def losses(self, packs: Sequence[Pack]) -> Tensor:
        """Each trained token's loss, row after row."""
        found: dict[int, Tensor] = {}
        for pack in packs:
            losses_M = pack_losses(self.model.decoder, pack).float().cpu()
            for place, row in enumerate(pack.rows):
                found[row] = losses_M[pack.owner_M == place]
        return torch.cat([found[row] for row in sorted(found)])

    @contextmanager
    def gradient(self, packs: Sequence[Pack]) -> Iterator[Tensor]:
        """Of the summed loss, to all of the adapter's numbers: where the optimizer will find it, until the
        end of the block. A mean's could be too small for float16."""
        grad = self.adapter.flat.grad
        assert grad is not None
        grad.zero_()
        try:
            for pack in packs:
                pack_loss(self.model.decoder, pack, weight=1.0)[0].backward()
            yield grad
        finally:
            grad.zero_()


def _cut(example: Example) -> Example:
    first = int(np.argmax(example.trained))
    begin = max(0, min(first - TOKENS // 2, len(example.ids) - TOKENS))
    part = slice(begin, begin + TOKENS)
    flags = example.trained[part].copy()
    flags[0] = False
    return Example(example.ids[part], flags, example.place)


def preflight(subject: Subject, skip: Collection[str] = ()) -> list[Tick]:
    """All checks. Raises PreflightError if one fails that is not skipped, UserError for an unknown name."""
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise UserError(
            f"there is no preflight check `{unknown[0]}`", fix=f"There are: {', '.join(CHECKS)}."
        )
    ticks = []
    for name, check in CHECKS.items():
        if name in skip:
            ticks.append(Tick(name, passed=True, text="not looked at", skipped=True))
            continue
        try:
            ticks.append(Tick(name, passed=True, text=check(subject)))
        except _Failed as failure:
            ticks.append(Tick(name, passed=False, text=failure.text, fix=failure.fix))
    failed = [tick for tick in ticks if not tick.passed]
    if failed:
        first, *others = failed
        also = "".join(f"\n  also {tick.name}: {tick.text}. {tick.fix}" for tick in others)
        raise PreflightError(
            f"preflight `{first.name}`: {first.text}",
            fix=f"{first.fix} Or go on with --skip-preflight {first.name}, which the run will say.{also}",
        )
    return ticks


def timed(subject: Subject, skip: Collection[str] = ()) -> tuple[list[Tick], float]:
    """The checks, and the seconds that they took."""
    began = time.perf_counter()
    return preflight(subject, skip), time.perf_counter() - began


# --- the checks -----------------------------------------------------------------------------------


def _places(rows: Iterable[str]) -> str:
    names = list(rows)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _trained(subject: Subject) -> str:
    rows = subject.data.train
    empty = [example.place for example in rows if not example.trained[1:].any()]
    if empty:
        raise _Failed(
            f"{len(empty):,} rows have no trained token: {_places(empty)}",
            "Look at them with `lorimer data show`.",
        )
    tokenizer = subject.model.tokenizer
    seen = [(talk, examples) for talk, examples in subject.data.looked_at if _answers(talk)]
    if seen and not any(
        tokenizer.decode(example.ids[example.trained].tolist()).strip()
        for _, each in seen
        for example in each
    ):
        raise _Failed(
            f"the chat template leaves the answers out: of {_places(talk.place for talk, _ in seen)} only "
            "the end is trained",
            "Give a template that writes each message's `content` as `data.chat_template`.",
        )
    return f"each of {len(rows):,} rows has trained tokens"


def _answers(talk: Conversation) -> bool:
    """Whether a chat has an answer in words."""
    return any(turn.role == "assistant" and turn.content.strip() for turn in talk.messages)


def _end_of_turn(subject: Subject) -> str:
    """Each row's answer ends with an end token, which is trained; rows that were cut cannot."""
    template, limit = subject.model.template, subject.config.data.max_tokens
    ends = {*template.end_ids, *template.tokenizer.eos_ids, *subject.model.base.eos_token_ids()}
    whole = [example for example in subject.data.train if len(example.ids) < limit]
    wanted = np.array(sorted(ends))
    open_rows = [row.place for row in whole if not np.isin(row.ids[row.trained], wanted).any()]
    if len(open_rows) > 0.005 * len(whole):
        raise _Failed(
            f"{len(open_rows):,} of {len(whole):,} rows train no end of turn, and would not teach to stop: "
            + _places(open_rows),
            "Give a template that closes each turn with the base's end token as `data.chat_template`.",
        )
    if not whole:
        return "every row was cut: none has its end"
    return f"the end of turn is trained in {len(whole) - len(open_rows):,} of {len(whole):,} rows"


def _bos(subject: Subject) -> str:
    bos = subject.model.tokenizer.bos_id
    if bos is None:
        return "the model has none"
    rows = subject.data.train
    twice = [row.place for row in rows if list(row.ids[:2]) == [bos, bos]]
    if twice:
        raise _Failed(
            f"{len(twice):,} rows begin with two: {_places(twice)}",
            "Take the token out of the texts, or out of the chat template.",
        )
    without = [row.place for row in rows if row.ids[0] != bos]
    if without and len(without) < len(rows):
        raise _Failed(
            f"{len(without):,} of {len(rows):,} rows begin without it: {_places(without)}",
            "Mend the chat template, so that all rows begin alike.",
        )
    return "no row begins with it" if without else "each row begins with exactly one"


def _inference(subject: Subject) -> str:
    """What is fed for an answer is what training put before it."""
    template, train_on = subject.model.template, subject.config.data.train_on
    looked = 0
    for conversation, examples in subject.data.looked_at:
        messages = conversation.messages
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for i in answers if train_on == "assistant" else answers[-1:]:
            fed = template.prompt_ids(messages[:i], conversation.tools)
            place = max(_alike(example, fed) for example in examples)
            if place < len(fed):
                raise _Failed(
                    f"{conversation.place}: the ids before message {i + 1} are not those that inference "
                    f"feeds: they part at token {place + 1}",
                    "Give a template that keeps what comes before an answer as `data.chat_template`.",
                )
            looked += 1
    return f"{looked:,} prompts are what inference feeds" if looked else "there are no chats"


def _alike(example: Example, fed: Sequence[int]) -> int:
    """How many of a prompt's first ids an example begins with: all of them, if what is trained follows."""
    seen = example.ids[: len(fed)]
    part = next((n for n, (a, b) in enumerate(zip(seen, fed, strict=False)) if a != b), len(seen))
    return part if part < len(fed) or example.trained[part : part + 1].any() else len(fed) - 1


def _apart(one: Tensor, other: Tensor, dtype: torch.dtype) -> float | None:
    """The largest difference if it is too large, else None."""
    difference = (one - other).abs()
    bad = difference.max() > LOSS_APART[dtype] or difference.mean() > MEAN_APART[dtype]
    return float(difference.max()) if bad or not torch.isfinite(difference).all() else None


def _packing(subject: Subject) -> str:
    packed = subject.losses(subject.packs(together=True))
    alone = subject.losses(subject.packs(together=False, share=False))
    if not torch.isfinite(alone).all():
        raise _without_numbers(subject.model)
    apart = _apart(packed, alone, subject.model.decoder.dtype)
    if apart is not None:
        raise _Failed(
            f"{len(subject.rows)} rows have other losses packed than alone: {apart:.2g} nats apart",
            "Set `data.pack: false`, and report this: it is a bug.",
        )
    return f"{len(packed):,} losses are the same packed and alone"


def _without_numbers(model: Model) -> BaseError:
    """That the base computes nothing, and the first weight that is to blame."""
    spec, base = model.spec, model.base
    weights = (name for name in base.tensors if name.endswith(".weight"))
    bad = next((name for name in weights if not read_weight(base, spec, name).isfinite().all()), None)
    return BaseError(
        "the base's losses are not numbers"
        + (f": its weight `{bad}` holds NaN or infinity" if bad else ""),
        fix="Copy or download the base again.",
        path=base.path,
    )


def _start(subject: Subject) -> str:
    if subject.config.lora.adapter is not None:
        return "it starts from a trained adapter"
    packs = subject.packs(together=True)
    adapted = subject.losses(packs)
    with subject.model.adapter_enabled(False):
        base = subject.losses(packs)
    apart = _apart(adapted, base, subject.model.decoder.dtype)
    if apart is not None:
        raise _Failed(
            f"the new adapter changes losses by {apart:.2g} nats before it is trained",
            "Report this: it is a bug.",
        )
    return "the new adapter changes nothing yet"


class _Shaken:
    """While it is entered each factor that is still zero is random, so that both have a gradient."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __enter__(self) -> None:
        named = self.adapter.tensors.items()
        self.zeros = [tensor for name, tensor in named if ".lora_" in name and not tensor.any()]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.zeros:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
        self.adapter.refresh()

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for tensor in self.zeros:
                tensor.zero_()
        self.adapter.refresh()


def _splitting(subject: Subject) -> str:
    with _Shaken(subject.adapter):
        with subject.gradient(subject.packs(together=True)) as grad:
            whole = grad.clone()
        with subject.gradient(subject.packs(together=False, share=False)) as grad:
            apart = float(grad.sub_(whole).norm() / whole.norm().clamp_min(1e-30))
    limit = GRADIENT_APART[subject.model.decoder.dtype]
    if not apart <= limit:
        raise _Failed(
            f"a step's gradient depends on how it is split: {apart:.2g} apart (wanted: at most {limit:g})",
            "Report this: it is a bug.",
        )
    return f"a split step has the gradient of the whole one ({apart:.0e} apart)"


def _gradients(subject: Subject) -> str:
    with _Shaken(subject.adapter), subject.gradient(subject.packs(together=True)):
        tensors = subject.adapter.tensors.items()
        silent = [name for name, tensor in tensors if tensor.grad is None or not tensor.grad.any()]
    # An expert that none of these few tokens takes has none; its neighbours must.
    silent = [name for name in silent if not _unseen_rows(name, subject)]
    heard = {parameter_of(name.split(".lora_")[0]) for name, _ in tensors if name not in silent}
    silent = [n for n in silent if not is_expert(p := n.split(".lora_")[0]) or parameter_of(p) not in heard]
    if silent:
        raise _Failed(
            f"{len(silent)} of {len(subject.adapter.tensors)} adapter tensors get no gradient: "
            + _places(silent),
            "Leave these modules out of `lora.target_modules`, or report this.",
        )
    return f"all {len(subject.adapter.tensors):,} adapter tensors get one"


def _unseen_rows(name: str, subject: Subject) -> bool:
    """Whether these are an embedding's rows of tokens that the few rows looked at do not hold."""
    table = subject.model.decoder.embedding
    ids = subject.adapter.spec.tokens.get(table.path, ())
    seen = np.concatenate([row.ids for row in subject.rows])
    return name == f"{table.path}.{OWN_ROWS}" and not np.isin(seen, ids).any()


def _embeddings(subject: Subject) -> str:
    """Control tokens that the rows use must have been trained: else what they mean is noise."""
    embedding, tokenizer = subject.model.decoder.embedding, subject.model.tokenizer
    if embedding.trained is not None:
        return "they are trained in this run"
    used = np.unique(np.concatenate([row.ids for row in subject.data.train]))
    added = {number for ids in subject.adapter.spec.tokens.values() for number in ids}
    special = [int(n) for n in used if tokenizer.is_special(int(n)) and int(n) not in added]
    here = f"{len(added.intersection(used.tolist()))} added tokens in use are trained in this run"
    if not special:
        return here if added else "no row uses a control token"
    device = subject.model.decoder.device
    ordinary = [int(number) for number in used[:2000] if int(number) not in set(special)]
    norms = embedding.weight.rows(torch.tensor(special, device=device)).float().norm(dim=1)
    usual = embedding.weight.rows(torch.tensor(ordinary or special, device=device)).float().norm(dim=1)
    least = UNTRAINED * float(usual.median())
    bad = [number for number, norm in zip(special, norms.tolist(), strict=True) if norm <= least]
    if bad:
        names = ", ".join(f"`{tokenizer.token(number)}`" for number in bad[:SHOWN])
        raise _Failed(
            f"{len(bad)} control tokens in the rows have an embedding that was never trained: {names}",
            "Add `embed_tokens` to `lora.modules_to_save`, or use a template with tokens of the base.",
        )
    text = f"{len(special)} control tokens in use have trained embeddings"
    return f"{text}, {here}" if added else text


def _leaks(subject: Subject) -> str:
    held = subject.data.test
    if not held:
        return "there are no held-out rows"
    train, template = subject.data.train, subject.model.template
    train_on = subject.config.data.train_on
    test = [example for conversation in held for example in template.examples(conversation, train_on)]
    known = {row.ids.tobytes(): row.place for row in train}
    same = [f"{row.place} = {known[row.ids.tobytes()]}" for row in test if row.ids.tobytes() in known]
    if same:
        raise _Failed(
            f"{len(same):,} of {len(test):,} held-out rows are also trained on: {_places(same)}",
            "Delete them from one of both: a score on them proves nothing.",
        )
    asked = ([_asked(row, template) for row in part] for part in (train, test))
    near = [f"{test[n.other].place} ~ {train[n.one].place}" for n in near_prompts(*asked)]
    if near:
        raise _Failed(
            f"{len(near):,} of {len(test):,} held-out rows ask nearly what a training row asks: "
            + _places(near),
            "Delete them from one of both: a score on them proves little.",
        )
    return f"none of {len(test):,} held-out rows is trained on, nor nearly"


def _asked(row: Example, template: ChatTemplate) -> str:
    """What stands before the first answer, markers left out; of plain text the whole row."""
    first = int(np.argmax(row.trained)) if row.trained.any() else len(row.ids)
    return template.tokenizer.decode(row.ids.tolist() if first <= 1 else row.ids[:first].tolist())


CHECKS: dict[str, Callable[[Subject], str]] = {
    "trained": _trained,
    "end-of-turn": _end_of_turn,
    "bos": _bos,
    "inference": _inference,
    "packing": _packing,
    "splitting": _splitting,
    "start": _start,
    "gradients": _gradients,
    "embeddings": _embeddings,
    "leaks": _leaks,
}
