"""How a run is told: a live table in a terminal, plain lines into a pipe.

Both are the Reporter that train() calls. What they say is made by the functions at the end; they
differ only in how they show it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from lorimer.evaluate.facts import GIB, duration, facts, next_commands, short_path
from lorimer.run import RunFolder

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live as RichLive
    from rich.text import Text

    from lorimer.evaluate.run import Comparison
    from lorimer.train.loop import RunResult

SHOWN_STEPS = 8  # in the live table
# What else the live picture needs of the screen's height: heading, bar, status and the cursor's line.
OTHER_LINES = 4
# The live picture is drawn when there is news, and no more often than this: drawing flickers.
REDRAWN_SECONDS = 0.25
# Columns of the live table and their least widths; in a narrow terminal the last of LEFT_OUT goes first.
COLUMNS = {"step": 5, "epoch": 5, "loss": 8, "lr": 7, "norm": 5, "tokens/s": 8, "memory": 8}
LEFT_OUT = ("lr", "tokens/s", "norm", "epoch", "memory")
# Steps that the time to go is judged by: enough to even out rows of different lengths.
TIMED_STEPS = 20
# The estimate is said once, when this many steps were timed.
ESTIMATED_AFTER = 3


def open_progress(stream: TextIO | None = None) -> Plain:
    """The reporter for a stream (stdout if not given): live in a terminal, plain otherwise."""
    stream = stream or sys.stdout
    dumb = os.environ.get("TERM") == "dumb"
    return Live(stream) if stream.isatty() and not dumb else Plain(stream)


class Clock:
    """Time to go, from the wall time of the last steps; evaluations and saves between them count."""

    def __init__(self) -> None:
        self.moments: deque[float] = deque(maxlen=TIMED_STEPS + 1)
        self.total = self.done = 0

    def start(self, info: dict[str, Any]) -> None:
        self.total, self.done = info["steps"], info["first_step"]
        self.moments.append(time.monotonic())

    def tick(self, step: int, total: int | None = None) -> None:
        """`total` where it is planned anew: a run with a time to end by."""
        self.done, self.total = step, total or self.total
        self.moments.append(time.monotonic())

    @property
    def to_go(self) -> float | None:
        """Seconds left, or None before the first step."""
        timed = len(self.moments) - 1
        if timed < 1:
            return None
        return (self.moments[-1] - self.moments[0]) / timed * (self.total - self.done)


class Plain:
    """A line for a step, at most one a second; everything else as it comes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.clock = Clock()
        self.steps_told = 0
        self.last_line = 0.0

    def __enter__(self) -> Plain:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held open here; the live one gives the terminal back."""

    def write(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def start(self, info: dict[str, Any]) -> None:
        self.clock.start(info)
        for name, text in facts(info):
            self.write(f"{name:<10}{text}")

    def step(self, record: dict[str, Any]) -> None:
        self.clock.tick(record["step"], record.get("total_steps"))
        self.steps_told += 1
        now = time.monotonic()
        if self.steps_told == ESTIMATED_AFTER and self.clock.to_go:
            self.write(f"estimate  {duration(self.clock.to_go)} for {self.clock.total:,} steps")
        if now - self.last_line >= 1 or record["step"] == self.clock.total:
            self.last_line = now
            self.write(step_line(record, self.clock))

    def evaluation(self, record: dict[str, Any]) -> None:
        self.write(evaluation_line(record))

    def saved(self, path: Path, step: int) -> None:
        self.write(f"saved {path.name}")

    def note(self, text: str) -> None:
        self.write(text)

    def proving(self, text: str) -> None:
        self.write(text)

    def finished(self, result: RunResult) -> None:
        from lorimer.evaluate.report import read_changes
        from lorimer.evaluate.show import answers_text, comparison_text

        run = RunFolder(result.path)
        self.write(finished_line(result))
        if result.comparison is not None:
            self.write("\n" + comparison_text(result.comparison))
        if changes := read_changes(run):
            self.write("\n" + answers_text(changes))
        self.write("\nnext")
        for command in next_commands(run.path, changes, proved=result.comparison is not None):
            self.write(f"  {command}")


class Live(Plain):
    """A panel, then the last steps in a table above a bar, redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        super().__init__(stream)
        self.console: Console = Console(file=stream, highlight=False)
        self.records: deque[dict[str, Any]] = deque(maxlen=SHOWN_STEPS)
        self.status = ""
        self.live: RichLive | None = None
        self.drawn = 0.0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.live is not None:
            self.status = ""
            self.live.stop()

    def _redraw(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if self.live is not None and (now or moment - self.drawn >= REDRAWN_SECONDS):
            self.drawn = moment
            self.live.refresh()

    def write(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text))

    def start(self, info: dict[str, Any]) -> None:
        from rich import box
        from rich.live import Live as RichLive
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        self.clock.start(info)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in facts(info):
            grid.add_row(name, Text(text))
        self.console.print(
            Panel(grid, box=box.ROUNDED, title="lorimer train", title_align="left", expand=False)
        )
        self.live = RichLive(console=self.console, get_renderable=self._picture, auto_refresh=False)
        self.live.start()

    def step(self, record: dict[str, Any]) -> None:
        self.clock.tick(record["step"], record.get("total_steps"))
        self.records.append(record)
        self.status = ""
        self._redraw(now=record["step"] == self.clock.total)

    def saved(self, path: Path, step: int) -> None:
        self.status = f"saved {path.name}"
        self._redraw(now=True)

    def proving(self, text: str) -> None:
        self.status = text
        self._redraw(now=True)

    def finished(self, result: RunResult) -> None:
        from rich.rule import Rule
        from rich.text import Text

        from lorimer.evaluate.report import read_changes
        from lorimer.evaluate.show import answers_text

        self._stop()
        run = RunFolder(result.path)
        self.write(finished_line(result))
        if result.comparison is not None:
            self.console.print(Rule("before and after, on held-out rows", align="left"))
            self._compare(result.comparison)
        changes = read_changes(run)
        if changes:
            self.console.print(Rule("answers that changed", align="left"))
            self.write(answers_text(changes))
        self.console.print(Rule("next", align="left"))
        for command in next_commands(run.path, changes, proved=result.comparison is not None):
            self.console.print(Text(f"  {command}", style="bold"), soft_wrap=True)

    def _compare(self, comparison: Comparison) -> None:
        """As a table where there is room for it, else as the lines that a pipe gets."""
        from lorimer.evaluate.show import comparison_table, comparison_text

        table = comparison_table(comparison)
        anywhere = self.console.options.update(width=1000)
        if self.console.measure(table, options=anywhere).maximum <= self.console.width:
            self.console.print(table)
        else:
            self.write(comparison_text(comparison))

    def _picture(self) -> RenderableType:
        """What is redrawn: the last steps, and the bar with the time to go."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        losses = [None, *(record["loss"] for record in self.records)]
        rows = [_cells(record, before) for record, before in zip(self.records, losses, strict=False)]
        rows = rows[-max(1, self.console.height - OTHER_LINES) :]
        columns = columns_for(self.console.width, rows)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True, min_width=COLUMNS[name])
        for cells in rows:
            table.add_row(*(cells[name] for name in columns))
        bar = Table.grid(padding=(0, 1))
        done, total = self.clock.done, self.clock.total
        to_go = self.clock.to_go
        left = "first step" if to_go is None else f"{duration(to_go)} to go" if done < total else "trained"
        width = max(5, min(30, self.console.width - 30))
        bar.add_row(ProgressBar(total=total, completed=done, width=width), f"{done}/{total}", left)
        return Group(table, bar, Text(self.status)) if self.status else Group(table, bar)


def columns_for(width: int, rows: Sequence[dict[str, str | Text]]) -> list[str]:
    """The columns of the live table that fit, two spaces between them: as a rule all from 60 on."""
    widths = {name: max([least, *(len(cells[name]) for cells in rows)]) for name, least in COLUMNS.items()}
    left_out = list(LEFT_OUT)
    columns = list(COLUMNS)
    while left_out and sum(widths[name] + 2 for name in columns) - 2 > width:
        columns.remove(left_out.pop())
    return columns


def _cells(record: dict[str, Any], before: float | None) -> dict[str, str | Text]:
    from rich.text import Text

    loss = Text(f"{record['loss']:.4f}")
    if before is None:
        loss.append("  ")
    else:
        loss.append(*((" ↓", "green") if record["loss"] < before else (" ↑", "red")))
    return {
        "step": str(record["step"]),
        "epoch": f"{record['epoch']:.2f}",
        "loss": loss,
        "lr": f"{record['learning_rate']:.1e}",
        "norm": f"{record['grad_norm']:.2f}",
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
        "memory": f"{record['memory_bytes'] / GIB:.1f} GiB",
    }


# --- what is said -----------------------------------------------------------------------------


def step_line(record: dict[str, Any], clock: Clock) -> str:
    width = len(str(clock.total))
    to_go = "" if clock.to_go is None or clock.done >= clock.total else f"  {duration(clock.to_go)} to go"
    return (
        f"step {record['step']:>{width}}/{clock.total}  loss {record['loss']:.4f}"
        f"  lr {record['learning_rate']:.1e}  norm {record['grad_norm']:.2f}"
        f"  {record['tokens_per_second']:,.0f} tokens/s{to_go}"
    )


def evaluation_line(record: dict[str, Any]) -> str:
    best = ", the best so far" if record["best"] else ""
    return f"step {record['step']}  validation loss {record['valid_loss']:.4f}{best}"


def finished_line(result: RunResult) -> str:
    run = RunFolder(result.path)
    seconds = run.read_record().get("train_seconds")
    took = f" in {duration(seconds)}" if seconds else ""
    lines = [f"trained {result.steps:,} steps{took}", f"adapter: {short_path(result.adapter)}"]
    if run.report.is_file():
        lines.append(f"report: {short_path(run.report)}")
    return "\n".join(lines)
