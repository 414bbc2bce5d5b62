"""train(): the spine. Read it from top to bottom; every step is one visible call."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lorimer import __version__
from lorimer.bases.open import BaseFiles, open_base
from lorimer.bases.store import resolve_base
from lorimer.config import RunConfig, dump_yaml
from lorimer.data.added import AddedTokens
from lorimer.data.batch import StepStream
from lorimer.data.pack import Pack, shared_prefix, split_into_packs
from lorimer.data.prepare import Prepared, prepare
from lorimer.data.template import ChatTemplate, Example
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import (
    AdapterError,
    ConfigError,
    Interrupted,
    LorimerError,
    StorageError,
    Terminated,
    UserError,
)
from lorimer.evaluate.facts import short_path
from lorimer.evaluate.report import write_report
from lorimer.evaluate.run import Comparison, Scores, changed_answers, compare_scores, evaluate_rows
from lorimer.generate.model import Model
from lorimer.kernels import trace
from lorimer.lora.adapter import (
    attach_adapter,
    fill_adapter,
    new_adapter,
    read_adapter,
    save_adapter,
    trainable_line,
    with_tokens_of,
)
from lorimer.lora.layers import LoraDropout
from lorimer.lora.targets import describe_targets, select_targets
from lorimer.machine import look, memory
from lorimer.model.families import why_not_native
from lorimer.model.grow import added_ids, added_json, added_to, with_tokens
from lorimer.model.load import check_ids, choose_place, load_decoder
from lorimer.model.loss import pack_losses
from lorimer.run import RunFolder, create_run
from lorimer.storage import check_space, check_writable, verify_folder, write_file
from lorimer.train.checkpoint import Progress, newest_checkpoint, read_progress, restore, save_checkpoint
from lorimer.train.deadline import Deadline, seconds_of
from lorimer.train.diagnose import diagnose, read_row_losses, suspicious
from lorimer.train.metrics import MetricsFile, Reporter, Silent, StepRecord, peak_memory
from lorimer.train.optimizer import make_optimizer
from lorimer.train.plan import (
    MICRO_BATCH_TOKENS,
    Plan,
    Target,
    alternatives,
    alternatives_text,
    load_of,
    make_plan,
    resident_bytes,
    size_text,
)
from lorimer.train.preflight import Subject, Tick, timed
from lorimer.train.profile import VIEWERS, Profile, table_text
from lorimer.train.resume import resumed_run
from lorimer.train.schedule import learning_rate, warmup_steps
from lorimer.train.step import StepGivenUp, StepResult, loss_scale, train_step
from lorimer.train.stop import Stop, interruptible
from lorimer.train.trackers import Trackers, open_trackers, without_secrets

# Most tokens computed at once where memory is plenty: products are at full speed from about 1,000.
LISTED = 200  # rows of a kind that run.json lists
ENDLESS = 10**9  # steps of a run that only time ends
STAMP = "%Y-%m-%dT%H:%M:%S%z"


@dataclass(slots=True)
class RunResult:
    """What a run left: its folder, its adapter, how far it got and how it did."""

    path: Path
    adapter: Path
    steps: int
    loss: float
    valid_loss: float | None
    before: Scores | None = None
    after: Scores | None = None
    comparison: Comparison | None = None


def train(
    config: RunConfig | None,
    *,
    resume: str | Path | None = None,
    reporter: Reporter | None = None,
    profile: int | None = None,
    skip_preflight: Collection[str] = (),
) -> RunResult:
    """Train an adapter as the settings say, and prove it on the held-out rows if there are any.

    `resume` names a run (its folder, its name, or "last") that goes on from its newest whole
    checkpoint; `config` may then be None or change what may change. `profile` is a number of steps
    whose time is explained; `skip_preflight` names checks of train/preflight.py. Raises the errors of
    lorimer.errors; Interrupted after Ctrl-C, once the state is saved.
    """
    reporter = reporter or Silent()
    run, config = (None, config) if resume is None else resumed_run(config, resume)
    if config is None:
        raise ConfigError("there are no settings to train with", fix="Give a config file.")
    check_writable(Path(config.output.dir))
    with ExitStack() as held:
        if run is not None:
            held.enter_context(run.locked())
        session = Session(config, reporter, run)
        if profile is not None:
            session.plan_profile(profile, run)
        session.check_room()
        if run is None:
            session.preflight(skip_preflight)
            held.enter_context(session.new_folder().locked())
        else:
            session.run = run
        try:
            session.restore_if_any(resuming=run is not None)
            session.announce()
            with interruptible() as stop:
                return _steps(session, stop)
        except BaseException as error:
            session.close_record(error)
            raise
        finally:
            session.close()


def _steps(session: Session, stop: Stop) -> RunResult:
    """The run from where it is to its end."""
    session.stop = stop
    try:
        session.begin_budget()
        session.make_up_evaluation()
        while (step := session.progress.step) < session.total_steps and not session.exhausted:
            session.profile_begins()
            session.one_step(step)
            if session.evaluation_due(step):
                session.evaluate()
            if session.save_due(step) or stop.asked or session.exhausted:
                session.save()
            session.profile_ends(last=stop.asked or session.exhausted)
            if stop.asked:
                raise session.interrupted()
        return session.finish()
    except StepGivenUp:
        session.save()
        raise session.interrupted() from None


def _begun(resumed: RunFolder | None) -> datetime | None:
    """When a run that goes on was begun, if it says. Raises ConfigError for a time that is none."""
    begun = resumed.read_record().get("started") if resumed else None
    try:
        return datetime.strptime(begun, STAMP) if begun else None
    except (TypeError, ValueError) as error:
        assert resumed is not None
        fix = (
            "Write the time as 2026-01-31T12:00:00+0000: a chat template may put the day into each prompt."
        )
        raise ConfigError(
            f"`started` is {begun!r}, which is no time", fix=fix, path=resumed.record
        ) from error


class Session:
    """What a run holds while it goes: base, adapter, stream of steps, optimizer, records."""

    run: RunFolder

    def __init__(self, config: RunConfig, reporter: Reporter, resumed: RunFolder | None = None) -> None:
        """Load everything and write nothing: what is wrong with the input leaves no trace."""
        self.config, self.reporter = config, reporter
        started = time.perf_counter()
        budget = config.train.budget
        self.deadline = None if budget is None else Deadline(seconds_of(budget))
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.base = self._open_base()
        self.place = choose_place(config.train.device, config.train.dtype)
        tokenizer = Tokenizer.from_base(self.base)
        self.template = ChatTemplate(self._template_source(), tokenizer)
        # A template may write the day into each prompt: a run that goes on keeps the day it was begun on.
        self.template.now = _begun(resumed) or datetime.now().astimezone()
        self.data: Prepared = prepare(config.data, self.template, seed=config.train.seed)
        for example in self.data.train + self.data.valid:
            check_ids(self.base, example.ids, example.place)
        self.data.notes += unused_tokens(self.data, self.base)
        self.stream = StepStream(
            rows=len(self.data.train),
            batch_size=config.train.batch_size,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps or (None if budget is None else ENDLESS),
            seed=config.train.seed,
            shuffle=config.data.shuffle,
        )
        self.plan = self._plan_memory(resident_bytes())
        decoder = load_decoder(self.base, self.place, config.quant)
        decoder.recompute, self.micro_batch_tokens = self.plan.shape.recompute, self.plan.micro_batch_tokens
        self.model = Model(self.base, decoder, tokenizer, config.base)
        self.model.template = self.template
        self._put_adapter()
        self.optimizer = make_optimizer(self.adapter, config.train)
        rate = self.adapter.spec.dropout
        self.dropout = LoraDropout(rate, config.train.seed, *self.place[::-1]) if rate else None
        self.progress = Progress(data_hash=self.data.train_hash(), base_fingerprint=self.base.fingerprint())
        self.shares = self._may_share()
        self.trims = self.model.decoder.rope.steady
        self.valid_packs = split_into_packs(
            self.data.valid, MICRO_BATCH_TOKENS, share=self.shares, trim=self.trims
        )
        self.ticks: list[Tick] = []
        self.exhausted = False
        self.stop = Stop()
        self._status: Literal["finished", "interrupted", "failed"] = "failed"
        self._saved_at = time.monotonic()
        self._trained: dict[str, torch.Tensor] = {}  # the last step's, while the best is in its place
        self.adapter_written = False
        self.planned = self.stream.total_steps
        self._before: Scores | None = None
        self.last: StepResult | None = None
        self.valid_loss: float | None = None
        self.saved_step: int | None = None
        self.profile: Profile | None = None
        self.seconds = {"load": time.perf_counter() - started, "eval": 0.0, "save": 0.0}

    def _open_base(self) -> BaseFiles:
        """The base, with the tokens that the settings add or that the adapter to start from brings."""
        base, wanted = open_base(resolve_base(self.config.base)), AddedTokens.of_config(self.config.data)
        if self.config.lora.adapter is None:
            return with_tokens(base, wanted)
        found = with_tokens_of(base, read_adapter(Path(self.config.lora.adapter)))
        if wanted and wanted != added_to(found):
            brought = ", ".join(added_to(found).all) or "none"
            raise ConfigError(
                f"`data.add_tokens` is not what the adapter in `lora.adapter` was trained with ({brought})",
                fix="Leave out `data.add_tokens` and `data.add_special_tokens`: an adapter has its own.",
            )
        return found

    def check_room(self) -> None:
        """Raise ConfigError or StorageError if the time is up already, or the disk too full for what the
        run will leave there."""
        if self.deadline is not None:
            self.deadline.check()
        disk = self.plan.disk
        # The adapter is written beside the old one.
        check_space(Path(self.config.output.dir), disk["checkpoints"] + 2 * disk["adapter"])

    def preflight(self, skip: Collection[str]) -> None:
        """The checks before the first step. Raises PreflightError, with nothing written yet."""
        subject = Subject(self.config, self.model, self.adapter, self.data, self.shares, self.trims)
        self.ticks, self.seconds["preflight"] = timed(subject, skip)

    def new_folder(self) -> RunFolder:
        """The folder of a run that begins."""
        config = self.config
        train_file = config.data.train if isinstance(config.data.train, str) else config.data.train[0]
        self.run = create_run(Path(config.output.dir), config.output.name, train_file)
        write_file(self.run.config, dump_yaml(config))
        return self.run

    def close_record(self, error: BaseException) -> None:
        """Note in run.json and report.html how it ended; a full disk must not hide the first error."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        self._status = "interrupted" if stopped else "failed"
        with suppress(LorimerError):
            self.run.update_record(status=self._status, error=str(error) or type(error).__name__)
            write_report(self.run)

    def close(self) -> None:
        """Close what is open; a run that failed early may have opened neither."""
        if self.profile is not None:
            self.profile.stop()
        if hasattr(self, "trackers"):
            self.trackers.close(self._status)
        if hasattr(self, "metrics"):
            self.metrics.close()
        if hasattr(self, "row_losses"):
            self.row_losses.close()

    def _template_source(self) -> str | None:
        if self.config.data.chat_template is None:
            return self.base.chat_template
        path = Path(self.config.data.chat_template)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "Save it as UTF-8, or give another `data.chat_template`."
            raise ConfigError(f"the chat template cannot be read: {error}", fix=fix, path=path) from error

    def _put_adapter(self) -> None:
        """A fresh adapter, or the one that `lora.adapter` names to start from."""
        decoder, config = self.model.decoder, self.config.lora
        if config.adapter is not None:
            files = read_adapter(Path(config.adapter))
            self.adapter = attach_adapter(decoder, files, fingerprint=self.base.fingerprint())
            names = list(self.adapter.spec.ranks)
            self.targets = select_targets(decoder, names) if names else []
        else:
            ids = added_ids(self.base)
            self.adapter, self.targets = new_adapter(
                decoder, config, seed=self.config.train.seed, tokens=ids
            )
        self.model.adapter = self.adapter
        if not self.adapter.parameters:
            raise AdapterError("the adapter has nothing to train")

    def _may_share(self) -> bool:
        """Whether a prefix that rows have in common may be computed once: each row's dropout is its
        own, and with some rope scalings a long row turns its prefix otherwise than a short one."""
        lengths = [len(example.ids) for example in self.data.train + self.data.valid]
        if not self.model.decoder.rope.shareable(lengths):
            return False
        if self.dropout and shared_prefix(self.data.train):
            self.data.notes.append("the rows' common prefix is not shared, because `lora.dropout` is on")
        return self.dropout is None

    def _plan_memory(self, program: int) -> Plan:
        """The run as it is planned: its rung of the memory ladder and its tokens at once are taken from it.

        Raises UserError, with what would fit, if the machine has not so much memory at all.
        """
        if self.place.device.type == "cuda":
            program, there = 0, torch.cuda.mem_get_info(self.place.device)[0]
        else:
            there = memory().available + program
        config = self.config
        answered = len(self.data.test[: config.evaluate.rows])
        load = load_of(
            config,
            self.data.train,
            steps=min(self.stream.total_steps, 1000),
            share=not config.lora.dropout and why_not_native(self.base.config) is None,
            answered=answered,
        )
        target = Target(self.place.device.type, there, here=True)
        plan = make_plan(
            config, self.base, load, target, program=program, dtype=self.place.dtype, probe=False
        )
        total = memory().total
        if self.place.device.type == "cpu" and plan.memory.peak > total:
            raise UserError(
                f"the run needs about {size_text(plan.memory.peak)} of memory, and this machine has "
                f"{size_text(total)}",
                fix=alternatives_text(alternatives(plan, self.base, program)),
            )
        if not plan.fits:
            self.data.notes.append(
                f"the run needs about {size_text(plan.memory.peak)} of memory and {size_text(there)} are "
                "free: `lorimer plan` says what needs less"
            )
        return plan

    def restore_if_any(self, *, resuming: bool) -> None:
        """Go on from the newest whole checkpoint, or begin."""
        path = newest_checkpoint(self.run, self._say) if resuming else None
        if path is not None:
            progress = read_progress(path)
            for name in ("data_hash", "base_fingerprint"):
                found, wanted = getattr(self.progress, name), getattr(progress, name)
                if found != wanted:
                    raise ConfigError(
                        f"the {'data' if name == 'data_hash' else 'base'} is not what this run was begun "
                        f"with: {found[:12]} (wanted: {wanted[:12]})",
                        fix="Put the files back as they were, or start a new run.",
                        path=self.run.config,
                    )
            restore(path, self.adapter, self.optimizer)
            self.progress, self.saved_step = progress, progress.step
            self.exhausted = self._out_of_patience()
            self._say(f"resumed after step {progress.step} from {path.name}")
        elif resuming:
            self._say("there is no whole checkpoint yet: the run begins again")
        self.metrics = MetricsFile(self.run.metrics, keep_until=self.progress.step)
        self.row_losses = MetricsFile(self.run.row_losses, keep_until=self.progress.step)
        self.trackers: Trackers = open_trackers(
            self.config.output.trackers,
            self.run.path,
            self.run.path.name,
            self.config.model_dump(),
            first_step=self.progress.step,
            note=self.reporter.note,
        )

    @property
    def total_steps(self) -> int:
        """Of the whole run; as many as there is time for, if that is what ends it."""
        if self.deadline is None:
            return self.stream.total_steps
        return min(self.stream.total_steps, self.planned)

    def begin_budget(self) -> None:
        """With a time to end by, the base answers the held-out rows first: the adapter's answers, at the
        end, take about as long."""
        if self.deadline is None:
            return
        self.deadline.use(self.progress.elapsed)
        if self.data.test:
            began = time.perf_counter()
            self._before = self._answer("before", enabled=False)
            self.deadline.reserve("proof", time.perf_counter() - began)
        self.deadline.check()
        self.planned = self.deadline.total_steps(self.progress.step)

    def _plan_time(self) -> None:
        """After a step: what the end needs, and how many steps still fit before it."""
        if self.deadline is None or self.last is None:
            return
        seconds = self.deadline.step_ends()
        if self.valid_packs and "evaluation" not in self.deadline.reserved:
            # Without a backward: about a third of what training on as many tokens takes.
            tokens = sum(pack.computed_tokens for pack in self.valid_packs)
            self.deadline.reserve("evaluation", 0.4 * seconds * tokens / max(1, self.last.tokens))
        self.progress.elapsed = self.deadline.elapsed
        self.planned = max(self.progress.step, self.deadline.total_steps(self.progress.step))
        if not self.adapter_written:
            began = time.perf_counter()
            self._write_adapter()
            self.deadline.reserve("saving", 3 * (time.perf_counter() - began))

    def announce(self) -> None:
        """The start panel's facts, into run.json too."""
        config = self.config
        total = 0 if self.deadline else self.stream.total_steps
        info = {
            "run": str(self.run.path),
            "base": config.base,
            "architecture": self.model.spec.family,
            "slower": self.model.decoder.slower,
            "base_parameters": self.base.parameters,
            "preset": list(config.preset),
            "dtype": str(self.place.dtype).removeprefix("torch."),
            "quant": config.quant.model_dump() | {"bytes": self.model.decoder.frozen_bytes},
            "device": str(self.place.device),
            "threads": torch.get_num_threads(),
            "trainable": trainable_line(self.adapter, self.base.parameters),
            "targets": describe_targets(self.targets, self.model.spec.layers, self._tables()),
            "r": max(self.adapter.spec.ranks.values(), default=0),
            "alpha": max(self.adapter.spec.alphas.values(), default=0.0),
            "rows": len(self.data.train),
            "tokens": self.data.tokens,
            "trained_tokens": self.data.trained_tokens,
            "shared_prefix": shared_prefix(self.data.train) if self.shares else 0,
            "valid_rows": len(self.data.valid),
            "test_rows": len(self.data.test),
            "steps": total,
            "budget": config.train.budget,
            "first_step": self.progress.step,
            "batch_size": config.train.batch_size,
            "micro_batch_tokens": self.micro_batch_tokens,
            "recompute": self.model.decoder.recompute,
            "epochs": config.train.epochs,
            "learning_rate": config.train.learning_rate,
            "lr_scheduler": config.train.lr_scheduler,
            "warmup_steps": warmup_steps(config.train, total),
            "template": "the default, because the base has none"
            if self.template.is_default
            else "the base's",
        }
        self.run.update_record(
            status="running",
            command=without_secrets(shlex.join(sys.argv)),
            version=__version__,
            versions={"python": sys.version.split()[0], "torch": torch.__version__},
            machine=look(self.run.path).to_dict(),
            base=config.base,
            base_path=str(self.base.path),
            base_fingerprint=self.progress.base_fingerprint,
            data_hash=self.progress.data_hash,
            template_hash=self.template.hash,
            started=self.template.now.strftime(STAMP) if self.template.now else None,
            load_seconds=self.seconds["load"],
            planned_memory=self.plan.memory.parts() | {"peak": self.plan.memory.peak},
            info=info,
        )
        self.reporter.start(info)
        if self.ticks:
            self.run.update_record(
                preflight={tick.name: "skipped" if tick.skipped else tick.text for tick in self.ticks}
            )
            self._say(f"preflight, {self.seconds['preflight']:.1f} s")
            for tick in self.ticks:
                self._say(f"  {tick}")
        for note in self.data.notes:
            self._say(note)

    def _tables(self) -> list[str]:
        """What is trained of embedding and head, as the start panel names it."""
        spec, added = self.adapter.spec, added_to(self.base)
        names = [self.model.spec.names.embedding, self.model.spec.names.head]
        found = [path.rpartition(".")[2] for path in names if path in spec.ranks]
        if added and spec.tokens:
            found.append(f"rows of {', '.join(added.all)}")
        return found

    def plan_profile(self, steps: int, run: RunFolder | None) -> None:
        """Explain this many steps; ConfigError, with nothing touched, if there are not so many."""
        done = max(run.saved_steps(), default=0) if run else 0
        self.profile = Profile(
            steps,
            to_go=self.stream.total_steps - done,
            device=self.place.device,
            native=self.model.decoder.native,
        )

    def profile_begins(self) -> None:
        if self.profile is not None:
            self.profile.begin()

    def profile_ends(self, *, last: bool) -> None:
        """Show and keep the table once its steps are done; the run goes on if that cannot be kept."""
        table = self.profile.end(self.progress.step, last=last) if self.profile is not None else None
        if self.profile is None or table is None:
            return
        self._say(table_text(table))
        try:
            self.profile.write(self.run.profile, table)
            self._say(f"trace: {short_path(self.run.profile / 'trace.json')}\n{VIEWERS}")
        except LorimerError as error:
            self._say(f"the profile is not kept: {error}")

    @trace.stage("step")
    def one_step(self, step: int) -> None:
        """Rows -> packs -> one update -> one line in metrics.jsonl."""
        began = time.perf_counter()
        if self.deadline is not None:
            self.deadline.step_begins()
        with trace.stage("data"):
            rows = self.stream.step_rows(step)
            examples = [self.data.train[row] for row in rows]
            split = partial(
                split_into_packs,
                examples,
                together=self.config.data.pack,
                share=self.shares,
                trim=self.trims,
            )
            packs = split(self.micro_batch_tokens)
        total = self.total_steps
        rate = learning_rate(self.config.train, step, total)
        self.last = train_step(
            self.model.decoder,
            self.optimizer,
            packs,
            step=step,
            learning_rate=rate,
            smoothing=self.config.train.label_smoothing,
            scale=loss_scale(self.place.dtype, step, self.progress.loss_scale),
            dropout=self.dropout,
            places=_places(examples),
            split=split,
            given_up=lambda: self.stop.overdue,
        )
        if self.last.split is not None:
            self.micro_batch_tokens = self.last.split
            self._say(
                f"memory ran out at step {step + 1}: it was computed again, {self.last.split:,} tokens at "
                "once, with the same gradient, and so are the steps that follow"
            )
        seconds = time.perf_counter() - began
        progress = self.progress
        progress.step = step + 1
        progress.loss_scale = self.last.loss_scale
        progress.tokens += self.last.tokens
        progress.trained_tokens += self.last.trained_tokens
        progress.train_seconds += seconds
        self._plan_time()
        record = StepRecord(
            step=step + 1,
            total_steps=self.total_steps,
            epoch=round(self.stream.epoch_at(step + 1), 4),
            loss=self.last.loss,
            learning_rate=rate,
            grad_norm=self.last.grad_norm,
            rows=len(rows),
            tokens=self.last.tokens,
            trained_tokens=self.last.trained_tokens,
            seconds=seconds,
            tokens_per_second=self.last.tokens / seconds,
            memory_bytes=peak_memory(self.place.device),
        )
        with trace.stage("records"):
            line = self.metrics.write(record)
            each = [round(loss, 4) for loss in self.last.row_losses]
            self.row_losses.write({"step": step + 1, "rows": [int(row) for row in rows], "losses": each})
            self.trackers.log(step + 1, line)
            self.reporter.step(line)

    def evaluation_due(self, step: int) -> bool:
        return bool(self.valid_packs) and self._due(self.config.train.eval_every, step)

    def save_due(self, step: int) -> bool:
        return self._due(self.config.output.save_every, step)

    def _due(self, every: int | str, step: int) -> bool:
        if every == "never":
            return False
        if step + 1 >= self.total_steps:
            return True
        if every == "epoch":
            return self.stream.ends_epoch(step)
        if isinstance(every, str):
            return time.monotonic() - self._saved_at >= seconds_of(every)
        return (step + 1) % every == 0

    def make_up_evaluation(self) -> None:
        """The evaluation that a run was stopped in, now that it goes on."""
        done = self.progress.step
        if done and self.progress.evaluated < done and self.evaluation_due(done - 1):
            self.evaluate()

    def _out_of_patience(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    @trace.stage("evaluation")
    def evaluate(self) -> None:
        """The validation loss, token-weighted; the best adapter so far is kept aside."""
        began = time.perf_counter()
        total = 0.0
        for pack in self.valid_packs:
            if self.stop.overdue:
                raise StepGivenUp
            total += float(pack_losses(self.model.decoder, pack).sum())
        loss = total / sum(pack.trained_tokens for pack in self.valid_packs)
        self.valid_loss = loss
        progress = self.progress
        progress.evaluated = progress.step
        better = progress.best_loss is None or loss < progress.best_loss
        if better:
            progress.best_loss, progress.best_step = loss, progress.step
            progress.evaluations_without_gain = 0
            self._write_adapter()
        else:
            progress.evaluations_without_gain += 1
            self.exhausted = self._out_of_patience()
        self.seconds["eval"] += time.perf_counter() - began
        if self.deadline is not None:
            self.deadline.reserve("evaluation", time.perf_counter() - began)
        record = {"step": progress.step, "valid_loss": loss, "best": better}
        self.metrics.write(record)
        self.trackers.log(progress.step, {"valid_loss": loss})
        self.reporter.evaluation(record)
        if self.exhausted:
            without = progress.evaluations_without_gain
            self._say(f"stopped early: no better validation loss in {without} evaluations")

    @trace.stage("saving")
    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step == self.progress.step:
            return
        began = time.perf_counter()
        self._take_back()
        self.metrics.sync()
        self.row_losses.sync()
        path = save_checkpoint(
            self.run, self.progress, self.optimizer, self._fill_adapter, keep=self.config.output.keep
        )
        self.saved_step = self.progress.step
        self._saved_at = time.monotonic()
        self.seconds["save"] += time.perf_counter() - began
        self.reporter.saved(path, self.progress.step)

    def _fill_adapter(self, folder: Path) -> None:
        fill_adapter(folder, self.adapter, self.model.decoder, self.config.base, self._manifest(), {})

    def _write_adapter(self) -> None:
        """The adapter as it is now, with tokenizer and template, to the run's adapter folder."""
        self.adapter_written = True
        extra = self.model.tokenizer.files() | {"chat_template.jinja": self.template.source.encode("utf-8")}
        save_adapter(
            self.run.adapter,
            self.adapter,
            self.model.decoder,
            base=self.config.base,
            ours=self._manifest(),
            extra_files=extra,
        )

    def _manifest(self) -> dict[str, Any]:
        """lorimer.json: what this adapter belongs to."""
        return {
            "lorimer": __version__,
            "base": {
                "name": self.config.base,
                "path": str(self.base.path),
                "fingerprint": self.progress.base_fingerprint,
                "quant": self.config.quant.model_dump(),
            },
            "template_hash": self.template.hash,
            "added_tokens": added_json(self.base),
            "data_hash": self.progress.data_hash,
            "run": self.run.path.name,
            "step": self.progress.step,
            "trained_tokens": self.progress.trained_tokens,
            "started_from": self.config.lora.adapter,
        }

    def finish(self) -> RunResult:
        """The best adapter, before and after on held-out rows, and the record closed."""
        if self.progress.best_step is None:
            self._write_adapter()
        elif self.progress.best_step != self.progress.step:
            self._take_best()
        result = RunResult(
            path=self.run.path,
            adapter=self.run.adapter,
            steps=self.progress.step,
            loss=self.last.loss if self.last else float("nan"),
            valid_loss=self.progress.best_loss,
        )
        if self.data.test:
            self._prove(result)
        self._status = "finished"
        self.run.update_record(
            status="finished",
            steps=self.progress.step,
            best_step=self.progress.best_step or self.progress.step,
            best_valid_loss=self.progress.best_loss,
            train_seconds=self.progress.train_seconds,
            eval_seconds=self.seconds["eval"],
            save_seconds=self.seconds["save"],
            peak_memory_bytes=peak_memory(self.place.device),
            finished=time.strftime(STAMP),
        )
        self._diagnose()
        try:
            write_report(self.run)
        except LorimerError as error:  # the run is done without it
            self._say(f"there is no report.html: {error}")
        self.reporter.finished(result)
        return result

    def _diagnose(self) -> None:
        """What the losses say about the run and about single rows, if it is plain."""
        lines = [json.loads(line) for line in self.run.metrics.read_text(encoding="utf-8").splitlines()]
        said = diagnose(
            [line["loss"] for line in lines if "loss" in line],
            [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line],
            self.config.train.learning_rate,
        )
        rows = suspicious(read_row_losses(self.run.row_losses), self.data.train)
        self.run.update_record(
            diagnosis=said,
            rows_to_look_at={one.kind: [list(pair) for pair in one.rows[:LISTED]] for one in rows},
        )
        for text in (*said, *rows):
            self._say(f"look: {text}")

    def _take_best(self) -> None:
        """Put the best adapter in place of the last, so that what is proved is what is kept."""
        if damage := verify_folder(self.run.adapter):
            raise StorageError(
                f"the best adapter is damaged: {damage}",
                fix="`lorimer verify` looks at the whole run; its checkpoints may be whole.",
                path=self.run.adapter,
            )
        files = read_adapter(self.run.adapter)
        self._trained = {name: tensor.detach().clone() for name, tensor in self.adapter.tensors.items()}
        for name, tensor in files.tensors.items():
            self.adapter.take(name, tensor)
        self.adapter.refresh()
        self._say(f"the adapter of step {self.progress.best_step} had the best validation loss and is kept")

    def _take_back(self) -> None:
        """The last step's adapter again, which a checkpoint is of."""
        with torch.no_grad():
            for name, tensor in self._trained.items():
                self.adapter.tensors[name].copy_(tensor)
        self._trained = {}

    def _prove(self, result: RunResult) -> None:
        """The base and the adapter answer the same held-out rows."""
        began = time.perf_counter()
        before = self._before or self._answer("before", enabled=False)
        after = self._answer("after", enabled=True)
        result.before, result.after = before, after
        result.comparison = compare_scores(before, after)
        samples = changed_answers(before, after, self.config.evaluate.samples)
        lines = [json.dumps(sample) for sample in samples]
        write_file(self.run.samples, "".join(line + "\n" for line in lines))
        self.seconds["eval"] += time.perf_counter() - began

    def _answer(self, label: str, *, enabled: bool) -> Scores:
        """The held-out rows answered with the adapter or without, kept in the run's folder."""
        rows = self.data.test[: self.config.evaluate.rows]
        self.reporter.proving(f"answering {len(rows)} held-out rows: {label}")
        with self.model.adapter_enabled(enabled):
            scores = evaluate_rows(
                self.model,
                rows,
                max_new_tokens=self.config.evaluate.max_new_tokens,
                batch_size=self.config.evaluate.batch_size,
                seed=self.config.train.seed,
                train_on=self.config.data.train_on,
                name=label,
                on_progress=self._go_on,
            )
        write_file(self.run.eval / f"{label}.json", json.dumps(scores.to_json(), indent=1))
        return scores

    def _go_on(self, done: int, total: int) -> None:
        """Answers can be given again: who asked to stop does not wait for all of them."""
        if self.stop.asked:
            raise StepGivenUp

    def interrupted(self) -> Interrupted:
        command = f"lorimer train --resume {shlex.quote(str(self.run.path))}"
        kind = Terminated if self.stop.number == signal.SIGTERM else Interrupted
        return kind(
            f"stopped after step {self.progress.step} of {self.total_steps}; the state is saved",
            fix=f"Go on with: {command}",
        )

    def _say(self, text: str) -> None:
        self.run.say(text)
        self.reporter.note(text)


def unused_tokens(data: Prepared, base: BaseFiles) -> list[str]:
    """That added tokens are in no training row: nothing teaches what they mean."""
    used = {int(number) for row in data.train for number in row.ids}
    pairs = zip(added_to(base).all, added_ids(base), strict=True)
    missing = [token for token, number in pairs if number not in used]
    if not missing:
        return []
    are = "is" if len(missing) == 1 else "are"
    return [f"{', '.join(f'`{token}`' for token in missing)} {are} added and in no training row"]


def _places(examples: list[Example]) -> Callable[[Pack], str]:
    """Where a pack's rows came from, for messages."""

    def places(pack: Pack) -> str:
        names = [examples[row].place for row in pack.rows]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more rows" if len(names) > 5 else "")

    return places
