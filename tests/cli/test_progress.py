"""What a run says, in a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorimer.cli import progress
from lorimer.cli.progress import Live, Plain, open_progress
from lorimer.evaluate.compare import Pairs, compare_pairs
from lorimer.evaluate.facts import duration, facts, next_commands
from lorimer.evaluate.run import Comparison

INFO: dict[str, Any] = {
    "run": "runs/home", "base": "smollm2-135m", "architecture": "llama", "base_parameters": 134_515_008,
    "dtype": "bfloat16", "device": "cpu", "threads": 2, "targets": "q_proj [x] in all 30 layers",
    "trainable": "trainable params: 4,884,480 || all params: 139,399,488 || trainable%: 3.5039",
    "r": 16, "alpha": 32.0, "rows": 2400, "tokens": 150_000, "trained_tokens": 60_000, "valid_rows": 300,
    "test_rows": 307, "steps": 5, "first_step": 0, "batch_size": 16, "micro_batch_tokens": 2048,
    "epochs": 1, "learning_rate": 1e-3, "lr_scheduler": "linear", "warmup_steps": 5,
    "template": "the base's",
}  # fmt: skip


def record(step: int) -> dict[str, Any]:
    return {
        "step": step, "epoch": step / 5, "loss": 3 / step, "learning_rate": 1e-3, "grad_norm": 1.5,
        "rows": 16, "tokens": 900, "trained_tokens": 400, "seconds": 10.0, "tokens_per_second": 90.0,
        "memory_bytes": 2**31,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, set by hand."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def result(path: Path, comparison: object = None) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(path=path, adapter=path / "adapter", steps=5, comparison=comparison)


def test_every_step_is_a_line_of_at_most_80_columns(clock: SimpleNamespace) -> None:
    out = io.StringIO()
    plain = Plain(out)
    plain.start(INFO)
    for step in range(1, 6):
        clock.seconds += 10
        plain.step(record(step))
    lines = out.getvalue().splitlines()
    assert [line for line in lines if line.startswith("step")][:2] == [
        "step 1/5  loss 3.0000  lr 1.0e-03  norm 1.50  90 tokens/s  40 s to go",
        "step 2/5  loss 1.5000  lr 1.0e-03  norm 1.50  90 tokens/s  30 s to go",
    ]
    assert lines.count("estimate  20 s for 5 steps") == 1
    assert lines[-1] == "step 5/5  loss 0.6000  lr 1.0e-03  norm 1.50  90 tokens/s"
    assert INFO["trainable"] in out.getvalue()
    assert max(map(len, lines)) <= 90


def test_fast_steps_get_a_line_a_second_and_the_last(clock: SimpleNamespace) -> None:
    out = io.StringIO()
    plain = Plain(out)
    plain.start(INFO | {"steps": 40})
    for step in range(1, 41):
        clock.seconds += 0.25
        plain.step(record(step))
    told = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines() if "loss" in line]
    assert told == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 40]


def test_a_resumed_run_counts_from_where_it_goes_on(clock: SimpleNamespace) -> None:
    out = io.StringIO()
    plain = Plain(out)
    plain.start(INFO | {"first_step": 3})
    clock.seconds += 7
    plain.step(record(4))
    assert "from step 4" in out.getvalue()
    assert "7 s to go" in out.getvalue()


def test_the_panel_holds_what_training_depends_on() -> None:
    text = "\n".join(f"{name} {line}" for name, line in facts(INFO))
    for part in (
        "smollm2-135m (llama, 135 M)",
        "r=16 alpha=32",
        "60,000 trained (40%)",
        "5 steps of 16 rows",
    ):
        assert part in text
    for part in ("linear, 0.001, 5 steps of warm-up", "300 valid, 307 test", "bfloat16", "runs/home"):
        assert part in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_table_shows_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with open_progress(out) as live:
        assert isinstance(live, Live)
        live.start(INFO)
        live.note("a note [red]x[/red]")
        for step in range(1, 6):
            live.step(record(step))
        live.evaluation({"step": 5, "valid_loss": 0.5, "best": True})
        live.proving("answering [1] row")
        live.finished(result(tmp_path / "run"))
    text = out.getvalue()
    for part in (
        "q_proj [x]",
        "[red]x[/red]",
        "validation loss 0.5000, the best so far",
        "5/5",
        "lorimer chat",
    ):
        assert part in text
    assert "[green]" not in text


COMPARED = compare_pairs(
    [
        Pairs("loss", [5.8] * 12, [3.6] * 12, [20.0] * 12),
        Pairs("json_precision", [0.0] * 12, [1.0] * 12, [1.0] * 12, 0.0, 1.0),
        Pairs("perplexity", [5.8] * 12, [3.6] * 12, [20.0] * 12),
    ],
    resamples=100,
)
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 24), (80, 24), (200, 60)])
def test_nothing_wraps_or_is_cut_in_a_terminal_of_this_size(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: SimpleNamespace
) -> None:
    """But for commands, which are to be copied, and for the scores, which need 60 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", str(height))
    large = {"epoch": 12.34, "tokens_per_second": 12_345.0, "memory_bytes": 2**37, "grad_norm": 12.34}
    out = Terminal()
    with Live(out) as live:
        live.start(INFO | {"steps": 12_345, "run": "runs/" + "x" * 90})
        for step in range(12_300, 12_346):
            clock.seconds += 40
            live.step(record(step) | large | {"loss": 3 - step % 7 / 10})
        live.proving("answering 307 held-out rows: before")
        frame = out.getvalue().rpartition("step")[2]
        live.finished(result(tmp_path / "run", Comparison(tuple(COMPARED), 12)))
    lines = CODES.sub("", out.getvalue()).replace("\r", "\n").splitlines()
    assert frame.count("\n") < height - 1
    assert "…" not in out.getvalue()
    for line in lines:
        if not line.startswith(("  lorimer", "  vllm", "  transformers")):
            assert len(line) <= max(width, 60 if "[" in line else 0), line
    names = lines[[line.startswith(" step") for line in lines].index(True)].split()
    assert names == ([*progress.COLUMNS] if width >= 60 else ["step", "loss", "lr", "tokens/s"])
    last = lines[max(n for n, line in enumerate(lines) if line.startswith("12345 "))].split()
    assert last[-1] == ("GiB" if width >= 60 else "12,345")
    assert any("won/lost/tied" in line for line in lines) == (width >= 80)


def test_the_live_table_is_drawn_when_there_is_news_and_not_too_often(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Live(out) as live:
        live.start(INFO | {"steps": 1000})

        def drawn() -> int:
            return out.getvalue().count("tokens/s")

        before = drawn()
        for step in range(1, 101):
            clock.seconds += 0.01
            live.step(record(step))
        assert 3 <= drawn() - before <= 5
        before = drawn()
        live.saved(Path("step-000100"), 100)
        assert drawn() - before == 1
        assert "saved step-000100" in out.getvalue()
        time.sleep(0.6)  # what draws by the clock would have drawn by now
        assert drawn() - before == 1


def test_no_status_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Live(out) as live:
        live.start(INFO)
        live.step(record(5))
        live.proving("answering 7 rows")
    assert "answering 7 rows" not in out.getvalue().rpartition("tokens/s")[2]


def test_an_error_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()

    def fail() -> None:
        with open_progress(out) as live:
            live.start(INFO)
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        fail()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("terminal", "term", "kind"), [(False, "xterm", Plain), (True, "dumb", Plain), (True, "xterm", Live)]
)
def test_only_a_terminal_gets_the_live_table(
    terminal: bool, term: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    assert type(open_progress(Terminal() if terminal else io.StringIO())) is kind


def test_the_next_commands_are_of_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change: Any = {"prompt": "what's on?"}
    path = tmp_path / "my runs" / "home"
    commands = next_commands(path, [change], proved=True)
    assert commands == [
        "lorimer chat 'my runs/home'",
        """lorimer generate 'my runs/home' 'what'"'"'s on?'""",
        "lorimer eval 'my runs/home'",
        "lorimer export 'my runs/home' --to gguf-lora  # for llama.cpp and Ollama",
        "lorimer merge 'my runs/home' --out 'my runs/home-merged'",
        "vllm serve 'my runs/home-merged'  # after merge, where vLLM is installed",
        "transformers serve 'my runs/home-merged'  # after merge, with transformers[serving]",
    ]
    assert not any("eval" in command for command in next_commands(path, [], proved=False))


@pytest.mark.parametrize("prompt", ["two\nlines", "long " * 20, "\x1b[31mred", ""])
def test_a_prompt_that_cannot_be_typed_is_no_example(tmp_path: Path, prompt: str) -> None:
    change: Any = {"prompt": prompt}
    assert next_commands(tmp_path, [change], proved=True)[1].endswith(" Hello")


def test_changed_answers_come_from_the_run(tmp_path: Path) -> None:
    change = {
        "kind": "fixed", "place": "t.jsonl:1", "prompt": "lamp on", "reference": "ON",
        "before": "no", "after": "ON",
    }  # fmt: skip
    run = result(tmp_path / "run")
    (run.path / "samples.jsonl").write_text(json.dumps(change) + "\n", encoding="utf-8")
    out = io.StringIO()
    Plain(out).finished(run)
    for part in ("t.jsonl:1", "lamp on", "before", "after", "'lamp on'"):
        assert part in out.getvalue()


def test_one_is_one() -> None:
    text = str(facts(INFO | {"steps": 1, "batch_size": 1, "rows": 1, "threads": 1, "warmup_steps": 1}))
    for part in ("1 step of 1 row'", "1 row ", "1 thread,", "1 step of warm-up"):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
