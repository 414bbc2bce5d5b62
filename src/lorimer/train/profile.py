"""Where the time of a step goes: some steps recorded, a table, and a trace for a browser's viewer.

The native kernels are timed by kernels/trace.py. Where PyTorch's kernels run (on a GPU, or without the
library) its own profiler times them, and the table says so. The steps compute what they always do.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorimer.errors import ConfigError
from lorimer.evaluate.facts import counted
from lorimer.kernels import trace
from lorimer.kernels.native import library
from lorimer.storage import STAGED, make_folder, storage_errors, write_file, write_json

# The first steps fill caches and allocate; they are no measure of the others.
WARM_UP = 2
DEFAULT_STEPS = 5
STEP = "step"
MARK = "lorimer: "  # before a stage's name in PyTorch's record
# Above every level of PyTorch's profiler, which else says on stderr that it starts and stops.
QUIET = "99"
PYTORCH = "PyTorch's, by its profiler, which takes time too"
SHOWN_KERNELS = 14
# A share of the step that is said: with less of it the times are the kernels' own.
WAITING_SAID = 0.1
VIEWERS = "it opens in chrome://tracing and ui.perfetto.dev"


@dataclass(slots=True)
class Row:
    """One line: calls, seconds and work of a step on average. `seconds` of the rows add up."""

    name: str
    calls: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def rate(self) -> str:
        """GFLOP/s where there are operations to count, else GB/s."""
        for amount, unit in ((self.flops, "GFLOP/s"), (self.bytes, "GB/s")):
            if amount and self.seconds:
                value = amount / self.seconds / 1e9
                return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:,.1f} {unit}"
        return ""


@dataclass(slots=True)
class Table:
    """The steps that were recorded, and one of them on average."""

    steps: list[int]
    source: str  # which kernels, and who timed them
    seconds: float
    kernels: list[Row]  # the longest first
    rest: list[Row]  # with the kernels they make up the step
    stages: list[Row]  # these make up the step too
    between: list[Row] = field(default_factory=list)  # evaluations and saves; seconds of one
    waiting: float = 0.0  # seconds of the step, within kernels too, with the thread on no processor

    def to_json(self) -> dict[str, Any]:
        """What table.json holds: all numbers are of one step, but those of `between` of one call."""
        return asdict(self)


class Profile:
    """Records `steps` steps after WARM_UP others; `begin` and `end` are called around each step."""

    def __init__(self, steps: int, *, to_go: int, device: torch.device, native: bool) -> None:
        """Raises ConfigError if the run, with `to_go` steps before it, has too few."""
        if steps < 1:
            raise ConfigError(f"{steps} steps cannot be profiled", fix="Ask for 1 or more.")
        if steps + WARM_UP > to_go:
            most = to_go - WARM_UP
            raise ConfigError(
                f"profiling {counted(steps, 'step')} takes {WARM_UP} more to warm up; {to_go} are to go",
                fix=f"At most {most}: --profile-steps {most}"
                if most > 0
                else "Train longer: raise `train.epochs` or `train.max_steps`.",
            )
        self.steps, self.device, self.native = steps, device, native
        self.recorded: list[int] = []
        self._seen = 0
        self._running = False
        self._recorder = trace.Recorder()
        self._torch: torch.profiler.profile | None = None

    def begin(self) -> None:
        """Before a step: the first one to record switches the recording on."""
        if self._seen == WARM_UP:
            self._start()
        self._seen += 1

    def end(self, step: int, *, last: bool) -> Table | None:
        """After step number `step` and what followed it; the table if that was the last to record."""
        if not self._running:
            return None
        self.recorded.append(step)
        if len(self.recorded) < self.steps and not last:
            return None
        self.stop()
        if self._torch is None:
            return native_table(self._recorder, self.recorded, f"lorimer's, {library.active()}")
        events = self._torch.events() or []
        return torch_table(self._recorder, events, self.recorded, cuda=self.device.type == "cuda")

    def _start(self) -> None:
        self._running = True
        if self.native:
            self._recorder = trace.start()
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # Shapes are what it counts operations by.
        self._torch = torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True)
        self._torch.start()
        self._recorder = trace.start(lambda name: torch.profiler.record_function(MARK + name))

    def stop(self) -> None:
        """Switch the recording off, if it is on."""
        if not self._running:
            return
        self._running = False
        trace.stop()
        if self._torch is not None:
            self._torch.stop()

    def write(self, folder: Path, table: Table) -> None:
        """table.json and trace.json into the folder. Raises StorageError."""
        make_folder(folder)
        write_json(folder / "table.json", table.to_json())
        path = folder / "trace.json"
        if self._torch is None:
            write_file(path, json.dumps(chrome_trace(self._recorder, self.recorded)))
            return
        staged = path.with_name(f"{STAGED}{path.name}-{os.getpid()}")
        with storage_errors(path):
            self._torch.export_chrome_trace(str(staged))
            os.replace(staged, path)


# --- from what was recorded to rows ----------------------------------------------------------------


def native_table(recorder: trace.Recorder, steps: list[int], source: str) -> Table:
    """The kernels that the recorder has timed, and what is left of the step."""
    whole = [stage for stage in recorder.stages if stage.name == STEP]
    calls = [call for call in recorder.calls if _within(call.begin, whole)]
    rows: dict[str, Row] = {}
    for call in calls:
        row = rows.setdefault(call.name, Row(call.name))
        row.calls += 1
        row.seconds += (call.end - call.begin) / 1e9
        row.flops += call.work.flops
        row.bytes += call.work.bytes
    own = sum(call.own for call in calls) / 1e9
    idle = sum(stage.waiting for stage in whole) - sum(call.waiting for call in calls)
    total = sum(stage.end - stage.begin for stage in whole) / 1e9
    others = total - sum(row.seconds for row in rows.values()) - own
    # Two clocks are compared, so that a wait of nothing can come out below nothing.
    waiting = min(max(0.0, idle / 1e9), others)
    rest = [
        Row("PyTorch and Python", seconds=others - waiting),
        Row("waiting", seconds=waiting),
        Row("this profile", seconds=own),
    ]
    return _averaged(recorder, steps, source, list(rows.values()), rest)


def torch_table(recorder: trace.Recorder, events: Sequence[Any], steps: list[int], *, cuda: bool) -> Table:
    """The operations that PyTorch's profiler has timed: on the GPU if there is one, else on the CPU.

    An operation's time is its own, without the operations that it calls.
    """
    on_cpu = [event for event in events if event.device_type.name == "CPU"]
    # Begin and end of each step, in the profiler's microseconds.
    whole = [event.time_range for event in on_cpu if event.name == MARK + STEP]
    rows: dict[str, Row] = {}
    for event in on_cpu:
        inside = any(step.start <= event.time_range.start <= step.end for step in whole)
        if not inside or not event.name.startswith("aten::"):
            continue
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        name = event.name.removeprefix("aten::")
        row = rows.setdefault(name, Row(name))
        row.calls += 1
        row.seconds += seconds
        row.flops += event.flops or 0
    total = sum(stage.end - stage.begin for stage in recorder.stages if stage.name == STEP) / 1e9
    left = total - sum(row.seconds for row in rows.values())
    return _averaged(recorder, steps, PYTORCH, list(rows.values()), [Row("Python, waiting", seconds=left)])


def _averaged(
    recorder: trace.Recorder, steps: list[int], source: str, kernels: list[Row], rest: list[Row]
) -> Table:
    """Sums over the steps become one step; the stages are the same whoever timed the kernels."""
    whole = [stage for stage in recorder.stages if stage.name == STEP]
    stages: dict[str, Row] = {}
    between: defaultdict[str, list[float]] = defaultdict(list)
    for stage in sorted(recorder.stages, key=lambda stage: stage.begin):
        seconds = (stage.end - stage.begin - stage.inner) / 1e9
        if not _within(stage.begin, whole):
            between[stage.name].append(seconds)
            continue
        name = "the rest" if stage.name == STEP else stage.name
        row = stages.setdefault(name, Row(name))
        row.calls += 1
        row.seconds += seconds
    stages["the rest"] = stages.pop("the rest")  # last
    for row in [*kernels, *rest, *stages.values()]:
        for key in ("calls", "seconds", "flops", "bytes"):
            setattr(row, key, getattr(row, key) / len(steps))
    return Table(
        steps=steps,
        source=source,
        seconds=sum(stage.end - stage.begin for stage in whole) / 1e9 / len(steps),
        kernels=sorted(kernels, key=lambda row: -row.seconds),
        rest=rest,
        stages=list(stages.values()),
        between=[Row(name, len(each), sum(each) / len(each)) for name, each in between.items()],
        waiting=sum(stage.waiting for stage in whole) / 1e9 / len(steps),
    )


def _within(begin: int, stages: Iterable[trace.Stage]) -> bool:
    return any(stage.begin <= begin < stage.end for stage in stages)


def chrome_trace(recorder: trace.Recorder, steps: Sequence[int]) -> dict[str, Any]:
    """Chrome's trace event format: complete events (ph X) in microseconds, stages above kernels."""
    first = min(stage.begin for stage in recorder.stages)
    numbers = iter(steps)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "lorimer train"}}
    ]
    for row, name in ((1, "stages"), (2, "kernels")):
        place = {"ph": "M", "pid": 1, "tid": row}
        events.append(place | {"name": "thread_name", "args": {"name": name}})
        events.append(place | {"name": "thread_sort_index", "args": {"sort_index": row}})
    for stage in sorted(recorder.stages, key=lambda stage: (stage.begin, -stage.end)):
        name = f"{STEP} {next(numbers)}" if stage.name == STEP else stage.name
        events.append(_event(1, name, stage, first) | {"args": {"waiting_us": stage.waiting / 1e3}})
    for call in recorder.calls:
        seconds = max(1, call.end - call.begin) / 1e9
        facts = {
            "size": call.work.size,
            "GFLOP/s": round(call.work.flops / seconds / 1e9, 2),
            "GB/s": round(call.work.bytes / seconds / 1e9, 2),
            "waiting_us": call.waiting / 1e3,
        }
        events.append(_event(2, call.name, call, first) | {"args": facts})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(row: int, name: str, span: trace.Stage | trace.Call, first: int) -> dict[str, Any]:
    begin, took = (span.begin - first) / 1e3, (span.end - span.begin) / 1e3
    return {"ph": "X", "pid": 1, "tid": row, "name": name, "ts": begin, "dur": took}


# --- in words ------------------------------------------------------------------------------------


def table_text(table: Table) -> str:
    """The table in at most 60 columns, for a terminal, a pipe or a log."""
    digits = 1 if table.seconds >= 0.1 else 2 if table.seconds >= 0.01 else 3
    first, last = table.steps[0], table.steps[-1]
    which = f"steps {first} to {last}" if last > first else f"step {first}"
    shown, others = table.kernels[:SHOWN_KERNELS], table.kernels[SHOWN_KERNELS:]
    if others:
        shown = [*shown, _together(others)]
    whole = Row(STEP, 0, table.seconds)

    def lines(title: str, rows: Sequence[Row]) -> list[str]:
        head = f"{title:<20}{'calls':>7}{'ms':>10}{'share':>8}"
        return [head.rstrip(), *(_line(row, table.seconds, digits) for row in [*rows, whole])]

    kernels = lines("kernel", [*shown, *table.rest])
    kernels[0] += f"{'rate':>14}"
    text = [
        f"where a step goes: {which}, {_ms(table.seconds, digits)} ms each",
        f"kernels: {table.source}",
        "",
        *kernels,
        "",
        *lines("stage", table.stages),
    ]
    for row in table.between:
        times = counted(int(row.calls), "time")
        text.append(f"between steps: {row.name} {_ms(row.seconds, digits)} ms ({times})")
    if table.waiting > WAITING_SAID * table.seconds:
        share = table.waiting / table.seconds
        text.append(f"{share:.0%} of the step, kernels included, was waiting:")
        text.append("for a processor that others use, other threads, a disk")
    return "\n".join(text)


def _together(rows: Sequence[Row]) -> Row:
    return Row(f"{len(rows)} others", sum(row.calls for row in rows), sum(row.seconds for row in rows))


def _line(row: Row, whole: float, digits: int) -> str:
    calls = f"{row.calls:,.0f}" if row.calls >= 0.5 else ""
    name = row.name if len(row.name) < 20 else row.name[:18] + "…"
    text = f"{name:<20}{calls:>7}{_ms(row.seconds, digits):>10}{row.seconds / whole:>8.1%}{row.rate:>14}"
    return text.rstrip()


def _ms(seconds: float, digits: int) -> str:
    return f"{seconds * 1e3:,.{digits}f}"
