"""load() and Model: text in, text out, with the adapter on or off."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch

from lorimer.bases.open import BaseFiles, open_base
from lorimer.bases.store import resolve_base
from lorimer.config import QuantConfig
from lorimer.data.added import AddedTokens
from lorimer.data.conversation import Message, to_messages
from lorimer.data.pack import make_pack
from lorimer.data.template import ChatTemplate, Example
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError, TemplateError, UserError
from lorimer.generate.engine import Answer, generate_ids
from lorimer.generate.sampling import Sampling
from lorimer.lora.adapter import (
    TEMPLATE,
    AdapterFiles,
    attach_adapter,
    is_adapter,
    read_adapter,
    read_template,
    with_tokens_of,
)
from lorimer.lora.layers import Adapter, remove
from lorimer.model.decoder import Decoder
from lorimer.model.grow import added_to
from lorimer.model.load import check_ids, choose_place, load_decoder
from lorimer.model.loss import pack_losses
from lorimer.model.spec import ModelSpec

Prompt = str | Sequence[dict[str, Any] | Message]
# Tokens scored at once when losses are measured, to bound memory.
SCORED_TOKENS = 4096


class Settings(TypedDict, total=False):
    """Keyword arguments of `Model.generate` and `Model.stream`."""

    tools: Sequence[Mapping[str, Any]]  # described to the model by its chat template
    raw: bool  # no chat template: the prompt is continued as it is
    max_new_tokens: int  # default 256
    temperature: float  # default 0: the most likely token
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    batch_size: int  # default 32


class Model:
    """A base in memory, perhaps with an adapter; made by `load`."""

    def __init__(self, base: BaseFiles, decoder: Decoder, tokenizer: Tokenizer, name: str) -> None:
        self.base, self.decoder, self.tokenizer, self.name = base, decoder, tokenizer, name
        self.base_path: Path = base.path
        self.template = ChatTemplate(base.chat_template, tokenizer)
        self.quant = QuantConfig()  # how its frozen weights are stored
        self.adapter: Adapter | None = None
        self.adapter_path: Path | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.decoder.spec

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer: those of the base's settings, the tokenizer's, the template's."""
        return sorted({*self.base.eos_token_ids(), *self.tokenizer.eos_ids, *self.template.end_ids})

    def set_adapter(self, path: Path | str | None, *, force: bool = False) -> None:
        """Put this adapter folder in place of the present one; None leaves the base.

        Raises AdapterError, with the present adapter still in place, if the folder cannot be read.
        """
        files = None if path is None else read_adapter(adapter_folder(Path(path)))
        fingerprint = self.base.fingerprint() if files else None
        if files is not None:
            _check_tokens(files, self.base)
        remove(self.decoder)
        self.adapter = self.adapter_path = None
        self.template = ChatTemplate(self.base.chat_template, self.tokenizer)
        if files is not None:
            try:
                self.adapter = attach_adapter(self.decoder, files, fingerprint=fingerprint, force=force)
            except AdapterError:
                remove(self.decoder)
                raise
            self.adapter_path = files.path
            self.template = _adapter_template(files, self.tokenizer) or self.template

    @contextmanager
    def adapter_enabled(self, enabled: bool) -> Iterator[None]:
        """Within it the adapter counts, or does not: the base answers from the same memory."""
        before = self.decoder.adapted
        self.decoder.adapted = enabled
        try:
            yield
        finally:
            self.decoder.adapted = before

    # A text is a sequence of texts too; the first signature that fits decides.
    @overload
    def generate(self, prompt: str, **settings: Unpack[Settings]) -> str: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompt: Sequence[dict[str, Any]], **settings: Unpack[Settings]) -> str: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **settings: Unpack[Settings]) -> list[str]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], **settings: Unpack[Settings]) -> str | list[str]:
        """The answer to a prompt, or to each of a list of prompts.

        A prompt is a text, which becomes one user message, or a list of messages
        `{"role": ..., "content": ...}`. With `raw` a text is continued as it is. Greedy unless
        `temperature` is set. Raises UserError for settings out of range or a prompt that is too long.
        """
        if isinstance(prompt, str):
            return self._answers([prompt], settings)[0]
        if prompt and isinstance(prompt[0], dict | Message):
            return self._answers([prompt], settings)[0]  # type: ignore[list-item]
        return self._answers(list(prompt), settings)  # type: ignore[arg-type]

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> Iterator[str]:
        """The same answer in pieces, as they come. Closing the iterator ends the generation."""
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        closed = threading.Event()

        def work() -> None:
            try:
                text = self.tokenizer.stream()
                sent = 0

                def on_token(answer: Answer) -> None:
                    nonlocal sent
                    if closed.is_set():
                        raise _Closed
                    for token in answer.tokens[sent:]:
                        pieces.put(text.push(token))
                    sent = len(answer.tokens)

                self._run([prompt], settings, on_token)
                pieces.put(text.finish())
                pieces.put(None)
            except _Closed:
                pass
            except BaseException as error:  # handed to the caller's thread
                pieces.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from _held_back(pieces, tuple(settings.get("stop", ())))
        finally:
            closed.set()
            worker.join()

    def prompt_ids(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None, *, raw: bool = False
    ) -> list[int]:
        """The ids that a prompt becomes: the same that training puts before an answer."""
        if raw:
            text = prompt if isinstance(prompt, str) else "".join(str(m) for m in prompt)
            start = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
            return [token for token in start if token is not None] + self.tokenizer.encode(text)
        return list(self.template.prompt_ids(to_messages(prompt), tools))

    def token_losses(self, examples: Sequence[Example]) -> list[np.ndarray[Any, Any]]:
        """Nats of each trained token of each example, in order."""
        losses: list[np.ndarray[Any, Any]] = [np.empty(0, np.float32)] * len(examples)
        rope = self.decoder.rope
        share = rope.shareable([len(example.ids) for example in examples])
        for members in _by_tokens(examples):
            pack = make_pack([examples[i] for i in members], members, share=share, trim=rope.steady)
            values, owners = pack_losses(self.decoder, pack).cpu().numpy(), pack.owner_M.numpy()
            for place, row in enumerate(pack.rows):
                losses[row] = values[owners == place]
        return losses

    def _answers(self, prompts: Sequence[Prompt], settings: Settings) -> list[str]:
        answers = self._run(prompts, settings, lambda answer: None)
        stops = tuple(settings.get("stop", ()))
        return [_cut(self.tokenizer.decode(answer.tokens), stops) for answer in answers]

    def _run(self, prompts: Sequence[Prompt], settings: Settings, on_token: Any) -> list[Answer]:
        known = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
        sampling = Sampling(**{k: v for k, v in settings.items() if k in known})  # type: ignore[arg-type]
        stops = tuple(settings.get("stop", ()))

        def stop(tokens: list[int]) -> bool:
            # Enough of the tail to hold the longest stop string, whatever a token decodes to.
            tail = self.tokenizer.decode(tokens[-max(map(len, stops), default=0) - 8 :])
            return any(text in tail for text in stops)

        given = [self.prompt_ids(p, settings.get("tools"), raw=settings.get("raw", False)) for p in prompts]
        for number, ids in enumerate(given, 1):
            check_ids(self.base, ids, f"prompt {number}")
        return generate_ids(
            self.decoder,
            given,
            max_new_tokens=settings.get("max_new_tokens", 256),
            sampling=sampling,
            eos_ids=self.eos_ids,
            stop=stop if stops else lambda tokens: False,
            batch_size=settings.get("batch_size", 32),
            on_token=on_token,
        )


def _check_tokens(files: AdapterFiles, base: BaseFiles) -> None:
    """Raise AdapterError for an adapter with tokens that this model was not loaded with: its tables have no
    rows for them."""
    said = files.ours.get("added_tokens")
    wanted = AddedTokens() if said is None else AddedTokens.of_json(said)
    if wanted and wanted != added_to(base):
        raise AdapterError(
            f"the adapter has tokens of its own ({', '.join(wanted.all[:5])}), which this model was loaded "
            "without",
            fix="Load the model by this adapter's folder.",
            path=files.path,
        )


class _Closed(Exception):
    """The reader of a stream went away."""


def _held_back(pieces: queue.Queue[str | BaseException | None], stops: tuple[str, ...]) -> Iterator[str]:
    """Text as it comes, but never a part of a stop string, nor anything after one."""
    waiting = ""
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        waiting += piece
        cut = _cut(waiting, stops)
        if cut != waiting:
            yield cut
            return
        held = max((n for s in stops for n in range(1, len(s)) if waiting.endswith(s[:n])), default=0)
        if ready := waiting[: len(waiting) - held]:
            yield ready
        waiting = waiting[len(waiting) - held :]
    if waiting:
        yield waiting


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first stop string."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _by_tokens(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples of like length, at most SCORED_TOKENS together."""
    members: list[int] = []
    tokens = 0
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].ids)):
        if members and tokens + len(examples[i].ids) > SCORED_TOKENS:
            yield members
            members, tokens = [], 0
        members.append(i)
        tokens += len(examples[i].ids)
    if members:
        yield members


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    base: str | Path | None = None,
    quant: str | QuantConfig | None = None,
    force: bool = False,
) -> Model:
    """A base (name, folder or .gguf), an adapter folder or a run folder, ready to answer.

    dtype is auto, bf16 or fp32. `base` puts an adapter on another copy of its base; `force` skips
    the check that it is the one it was trained on. `quant` says how frozen weights are stored (none, nf4,
    fp4, int8, keep); if it is not given, as the adapter was trained. Raises BaseError or AdapterError.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    folder = adapter_folder(Path(path))
    adapter = folder if is_adapter(folder) else None
    wanted = base if base is not None else base_of(adapter) if adapter else str(path)
    files = open_base(resolve_base(wanted))
    files = with_tokens_of(files, read_adapter(adapter)) if adapter else files
    stored = trained_quant(adapter) if quant is None else _quant(quant)
    decoder = load_decoder(files, choose_place(device, dtype), stored)
    model = Model(files, decoder, Tokenizer.from_base(files), str(wanted))
    model.quant = stored
    if adapter is not None:
        model.set_adapter(adapter, force=force)
    return model


def adapter_folder(path: Path) -> Path:
    """The adapter of a run folder, or the folder itself."""
    inside = path / "adapter"
    return inside if is_adapter(inside) and not is_adapter(path) else path


def base_of(adapter: Path) -> str:
    """The name or path of the base that an adapter folder was trained on. Raises AdapterError."""
    files = read_adapter(adapter)
    name = files.ours.get("base", {}).get("path") or files.base
    # The name it was trained under first; the place it had then if that name is not kept here.
    if files.base and name != files.base:
        try:
            resolve_base(files.base)
            name = files.base
        except Exception:
            pass
    if not name:
        raise AdapterError("the adapter does not say which base it is for", fix="Add --base.", path=adapter)
    return str(name)


def _quant(given: str | QuantConfig) -> QuantConfig:
    if isinstance(given, QuantConfig):
        return given
    try:
        return QuantConfig.model_validate({"kind": given})
    except ValueError as error:
        raise UserError(
            f"the storage `{given}` is not known (wanted: none, nf4, fp4, int8 or keep)"
        ) from error


def trained_quant(adapter: Path | None) -> QuantConfig:
    """How the base's weights were stored when the adapter was trained; `none` if it does not say."""
    given = read_adapter(adapter).ours.get("base", {}).get("quant") if adapter else None
    try:
        return QuantConfig() if given is None else QuantConfig.model_validate(given)
    except ValueError as error:
        assert adapter is not None
        raise AdapterError(
            f"its manifest says that the base was stored as {given}, which is not known",
            fix="Name the storage with --quant.",
            path=adapter,
        ) from error


def _adapter_template(files: AdapterFiles, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template an adapter was trained with, if it keeps one."""
    source = read_template(files.path)
    try:
        return None if source is None else ChatTemplate(source, tokenizer)
    except TemplateError as error:
        raise TemplateError(error.problem, fix=error.fix, path=files.path / TEMPLATE) from error
