"""A profile: the same numbers, rows that add up, a trace that nests, and what is refused."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorimer.config import RunConfig, config_from
from lorimer.errors import ConfigError, DivergenceError, Interrupted, StorageError
from lorimer.kernels import trace
from lorimer.kernels.native import library
from lorimer.train import profile as profile_module
from lorimer.train import step as step_module
from lorimer.train.loop import train
from lorimer.train.metrics import Silent
from lorimer.train.profile import Profile, Row, Table, native_table, table_text, torch_table
from small_base import write_chat_base, write_rows

BEST = library.available()[-1:]
ISAS = ["reference", *BEST]
native = pytest.mark.skipif(not BEST, reason="no kernels are compiled here")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny", head_dim=16)


@pytest.fixture(autouse=True)
def nothing_left_on() -> Iterator[None]:
    yield
    assert trace.recorder is None


@pytest.fixture
def settings(tmp_path: Path, base: Path) -> RunConfig:
    """8 steps, of two packs each."""
    return config_from(
        {
            "base": str(base),
            "data": {
                "train": str(write_rows(tmp_path / "train.jsonl", 21)),
                "valid": str(write_rows(tmp_path / "valid.jsonl", 3, seed=7)),
            },
            "lora": {"r": 4, "alpha": 8},
            "train": {
                "epochs": 2,
                "batch_size": 6,
                "learning_rate": 5e-3,
                "dtype": "fp32",
                "threads": 1,
                "micro_batch_tokens": 200,
                "eval_every": 4,
            },
            "output": {"dir": str(tmp_path / "runs"), "name": "run", "save_every": 4},
        }
    )


class Notes(Silent):
    """Keeps what is said, and after some steps asks to stop as Ctrl-C does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self.stop_after = stop_after

    def note(self, text: str) -> None:
        self.said.append(text)

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.stop_after:
            signal.raise_signal(signal.SIGINT)


def numbers(run: Path) -> tuple[list[dict[str, Any]], bytes]:
    """All of metrics.jsonl that is no clock's, and the adapter."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = {"seconds", "tokens_per_second", "memory_bytes"}
    kept = [{key: value for key, value in line.items() if key not in clocks} for line in lines]
    return kept, (run / "adapter/adapter_model.safetensors").read_bytes()


def read(run: Path, name: str) -> Any:
    return json.loads((run / "profile" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("isa", ISAS)
def test_a_profiled_run_computes_the_same(settings: RunConfig, isa: str) -> None:
    with library.using(isa):
        plain, profiled = train(settings).path, train(settings, profile=3).path
    assert numbers(profiled) == numbers(plain)
    assert len(numbers(profiled)[0]) == 10
    records = [json.loads((run / "run.json").read_text()) for run in (plain, profiled)]
    assert list(records[0]) == list(records[1])
    assert records[0]["info"] | {"run": ""} == records[1]["info"] | {"run": ""}
    assert not (plain / "profile").exists()


@pytest.mark.parametrize("isa", ISAS)
def test_the_rows_add_up_to_the_step(settings: RunConfig, isa: str) -> None:
    with library.using(isa):
        run = train(settings, profile=3).path
    table = read(run, "table.json")
    assert table["steps"] == [3, 4, 5]
    whole = pytest.approx(table["seconds"], rel=1e-9)
    assert sum(row["seconds"] for row in table["kernels"] + table["rest"]) == whole
    assert sum(row["seconds"] for row in table["stages"]) == whole
    assert all(row["seconds"] >= 0 for row in table["kernels"] + table["rest"] + table["stages"])
    packs = table["stages"][1]["calls"]
    assert packs > 1
    assert {row["name"]: row["calls"] for row in table["stages"]} == {
        "data": 1, "forward": packs, "backward": packs, "optimizer": 1, "refresh": 1, "records": 1,
        "the rest": 1,
    }  # fmt: skip
    # After step 4: apart from the steps, with the seconds of one.
    assert [(row["name"], row["calls"]) for row in table["between"]] == [("evaluation", 1), ("saving", 1)]


@native
def test_the_kernels_are_lorimers_where_they_run(settings: RunConfig) -> None:
    with library.using(BEST[0]):
        run = train(settings, profile=2).path
    table = read(run, "table.json")
    assert table["source"] == f"lorimer's, {BEST[0]}"
    kernels = {row["name"]: row for row in table["kernels"]}
    packs = table["stages"][1]["calls"]
    # Of 3 layers; the validation losses after step 4 are not in the step.
    for name, calls in {
        "attention_forward": 3 * packs, "attention_backward": 3 * packs, "gated_backward": 3 * packs,
        "head_loss": packs, "adamw": 1, "squared_norm": 1, "scaled_copies": 1,
    }.items():  # fmt: skip
        assert kernels[name]["calls"] == calls, name
    assert kernels["matmul"]["flops"] > kernels["attention_forward"]["flops"] > 0
    assert kernels["adamw"]["bytes"] > kernels["squared_norm"]["bytes"] > 0
    assert [row["name"] for row in table["rest"]] == ["PyTorch and Python", "waiting", "this profile"]


@native
def test_the_trace_nests(settings: RunConfig) -> None:
    with library.using(BEST[0]):
        run = train(settings, profile=2).path
    content = read(run, "trace.json")
    rows = {
        event["tid"]: event["args"]["name"]
        for event in content["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert rows == {1: "stages", 2: "kernels"}
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    slack = 1e-3  # of a microsecond: times are written as floats

    def holds(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
        end = inner["ts"] + inner["dur"]
        return bool(outer["ts"] <= inner["ts"] + slack and end <= outer["ts"] + outer["dur"] + slack)

    stages = [event for event in events if event["tid"] == 1]
    kernels = [event for event in events if event["tid"] == 2]
    steps = [event for event in stages if event["name"].startswith("step")]
    assert [event["name"] for event in steps] == ["step 3", "step 4"]
    for event in stages:
        if event["name"] not in ("step 3", "step 4", "evaluation", "saving"):
            assert sum(holds(step, event) for step in steps) == 1, event
    at = {event["name"]: event for event in stages}
    assert holds(at["optimizer"], at["refresh"])
    for event in kernels:
        assert any(holds(stage, event) for stage in stages), event
        assert not set(event) - {"ph", "pid", "tid", "name", "ts", "dur", "args"}
    for before, after in pairwise(kernels):
        assert before["ts"] + before["dur"] <= after["ts"] + slack
    # Microseconds: the two steps, as the table has them in seconds.
    table = read(run, "table.json")
    assert sum(event["dur"] for event in steps) / 2e6 == pytest.approx(table["seconds"], rel=1e-6)
    matmul = next(event for event in kernels if event["name"] == "matmul")
    assert re.fullmatch(r"\d+ x \d+ x \d+.*", matmul["args"]["size"])
    assert matmul["args"]["GFLOP/s"] > 0


def test_pytorchs_profiler_times_what_is_not_lorimers(
    settings: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    notes = Notes()
    with library.using("reference"):
        run = train(settings, profile=2, reporter=notes).path
    table = read(run, "table.json")
    assert table["source"] == profile_module.PYTORCH
    kernels = {row["name"]: row for row in table["kernels"]}
    assert kernels["mm"]["flops"] > 0
    assert kernels["mm"]["calls"] % table["stages"][1]["calls"] == 0
    names = [event.get("name") for event in read(run, "trace.json")["traceEvents"]]
    assert names.count("lorimer: step") == 2
    assert "aten::mm" in names
    assert [path.name for path in sorted((run / "profile").iterdir())] == ["table.json", "trace.json"]
    assert "kernels: PyTorch's" in "\n".join(notes.said)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("isa", ISAS)
def test_the_table_is_said_once_in_60_columns_and_kept_in_the_log(settings: RunConfig, isa: str) -> None:
    notes = Notes()
    with library.using(isa):
        run = train(settings, profile=3, reporter=notes).path
    tables = [note for note in notes.said if note.startswith("where a step goes: steps 3 to 5, ")]
    assert len(tables) == 1
    assert max(map(len, tables[0].splitlines())) <= 60
    assert "between steps: evaluation " in tables[0]
    for name in ("kernel ", "stage ", "forward ", "refresh ", "step "):
        assert f"\n{name}" in tables[0]
    assert tables[0] in (run / "train.log").read_text(encoding="utf-8")
    assert any(note.startswith("trace: ") and "profile/trace.json" in note for note in notes.said)


def test_a_resumed_run_is_profiled_from_where_it_goes_on(settings: RunConfig, tmp_path: Path) -> None:
    whole = train(settings).path
    with pytest.raises(Interrupted):
        train(settings, reporter=Notes(stop_after=3))
    cut = train(None, resume=tmp_path / "runs/run-2", profile=2).path
    assert read(cut, "table.json")["steps"] == [6, 7]
    assert numbers(cut) == numbers(whole)


def test_a_stop_while_recording_shows_what_there_is(settings: RunConfig, tmp_path: Path) -> None:
    notes = Notes(stop_after=4)
    with pytest.raises(Interrupted):
        train(settings, profile=5, reporter=notes)
    assert any(note.startswith("where a step goes: steps 3 to 4, ") for note in notes.said)
    assert read(tmp_path / "runs/run", "table.json")["steps"] == [3, 4]


@pytest.mark.parametrize("isa", ISAS)
def test_an_error_while_recording_ends_the_recording(
    settings: RunConfig, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    pack_loss, calls = step_module.pack_loss, iter(range(100))

    def broken(*args: Any, **given: Any) -> Any:
        loss, each = pack_loss(*args, **given)
        return (loss * float("nan") if next(calls) == 8 else loss), each

    monkeypatch.setattr(step_module, "pack_loss", broken)
    with library.using(isa), pytest.raises(DivergenceError, match="at step"):
        train(settings, profile=3)
    assert trace.recorder is None
    assert not torch.autograd._profiler_enabled()


def test_a_profile_that_cannot_be_kept_does_not_stop_the_run(
    settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise StorageError("cannot write: No space left", path=path)

    monkeypatch.setattr(profile_module, "write_json", full)
    notes = Notes()
    assert train(settings, profile=2, reporter=notes).steps == 8
    assert any("the profile is not kept: " in note and "No space left" in note for note in notes.said)
    assert any("where a step goes" in note for note in notes.said)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (0, "0 steps cannot be profiled"),
        (-1, "-1 steps cannot be profiled"),
        (7, "profiling 7 steps takes 2 more to warm up; 8 are to go\n  At most 6: --profile-steps 6"),
    ],
)
def test_wrong_numbers_of_steps_are_refused_before_anything_is_written(
    settings: RunConfig, tmp_path: Path, steps: int, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(settings, profile=steps)
    assert problem in str(caught.value)
    assert list((tmp_path / "runs").glob("*")) == []


def test_a_finished_run_stays_as_it_is_when_a_profile_is_refused(settings: RunConfig) -> None:
    run = train(settings).path
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="Train longer"):
        train(None, resume=run, profile=1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_most_that_fits_is_taken(settings: RunConfig) -> None:
    assert read(train(settings, profile=6).path, "table.json")["steps"] == [3, 4, 5, 6, 7, 8]


# --- from records to rows, with times set by hand ---------------------------------------------------


def stage(name: str, begin: int, end: int, *, waiting: int = 0, inner: int = 0) -> trace.Stage:
    ms = 10**6
    return trace.Stage(name, begin * ms, end * ms, waiting * ms, inner * ms)


def two_steps() -> trace.Recorder:
    """Of 100 and 200 ms, with an evaluation between them."""
    recorder = trace.Recorder()
    recorder.stages = [
        stage("forward", 10, 50),
        stage("refresh", 60, 70),
        stage("optimizer", 55, 80, inner=10),
        stage("step", 0, 100, waiting=30, inner=65),
        stage("evaluation", 100, 400),
        stage("forward", 410, 590),
        stage("step", 400, 600, waiting=50, inner=180),
    ]
    return recorder


def call(name: str, begin: int, end: int, **given: Any) -> trace.Call:
    ms = 10**6
    work = trace.Work("", given.get("flops", 0), given.get("bytes", 0))
    return trace.Call(
        name, begin * ms, end * ms, given.get("own", 0) * ms, given.get("waiting", 0) * ms, work
    )


def rows_of(rows: list[Row]) -> dict[str, tuple[float, float]]:
    return {row.name: (row.calls, round(row.seconds, 9)) for row in rows}


def test_a_step_is_kernels_and_what_is_left() -> None:
    recorder = two_steps()
    recorder.calls = [
        call("matmul", 10, 40, waiting=10, own=2, flops=3e9, bytes=1e6),
        call("rotate", 41, 42, bytes=4e6),
        call("matmul", 150, 350, flops=1e12),  # of the evaluation
        call("matmul", 420, 520, waiting=20, flops=10e9),
    ]
    table = native_table(recorder, [3, 4], "tests")
    assert table.seconds == pytest.approx(0.15)
    assert [row.name for row in table.kernels] == ["matmul", "rotate"]
    assert rows_of(table.kernels) == {"matmul": (1, 0.065), "rotate": (0.5, 0.0005)}
    assert table.kernels[0].rate == "100 GFLOP/s"
    assert table.kernels[1].rate == "4.0 GB/s"
    # 80 ms of waiting, 30 of them in kernels.
    assert rows_of(table.rest) == {
        "PyTorch and Python": (0, 0.0585), "waiting": (0, 0.025), "this profile": (0, 0.001)
    }  # fmt: skip
    assert rows_of(table.stages) == {
        "forward": (1, 0.11), "refresh": (0.5, 0.005), "optimizer": (0.5, 0.0075), "the rest": (1, 0.0275)
    }  # fmt: skip
    assert list(rows_of(table.stages))[-1] == "the rest"
    assert rows_of(table.between) == {"evaluation": (1, 0.3)}
    text = table_text(table)
    assert "between steps: evaluation 300.0 ms (1 time)" in text
    assert "27% of the step, kernels included, was waiting" in text


def event(name: str, begin: int, end: int, *, device: str = "CPU", **given: Any) -> SimpleNamespace:
    """As PyTorch's profiler gives it; times in microseconds."""
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(start=begin, end=end),
        self_cpu_time_total=given.get("cpu", 0),
        self_device_time_total=given.get("gpu", 0),
        flops=given.get("flops"),
    )


@pytest.mark.parametrize(("cuda", "ms"), [(False, 30), (True, 70)])
def test_on_a_gpu_its_time_counts_and_on_a_cpu_the_processors(cuda: bool, ms: int) -> None:
    events = [
        event("lorimer: step", 0, 100_000, cpu=1000),
        event("aten::mm", 10_000, 60_000, cpu=30_000, gpu=70_000, flops=7_000_000_000),
        event("_ProjectBackward", 10_000, 90_000, cpu=5000),
        event("ampere_gemm", 15_000, 85_000, device="CUDA", gpu=70_000),
        event("aten::mm", 200_000, 300_000, cpu=90_000, gpu=90_000),  # of the evaluation
    ]
    recorder = trace.Recorder()
    recorder.stages = [stage("step", 0, 100)]
    table = torch_table(recorder, events, [3], cuda=cuda)
    assert rows_of(table.kernels) == {"mm": (1, ms / 1e3)}
    assert rows_of(table.rest) == {"Python, waiting": (0, round(0.1 - ms / 1e3, 9))}
    assert table.kernels[0].rate == f"{7000 / ms:,.0f} GFLOP/s"


def test_long_names_many_kernels_and_short_steps_fit() -> None:
    kernels = [Row(f"a_very_long_name_of_a_kernel_{i}", 12_345, 1e-5, flops=1e9) for i in range(30)]
    table = Table([3], "tests", 0.0015, kernels, [Row("Python, waiting", seconds=0.0012)], [])
    lines = table_text(table).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == "where a step goes: step 3, 1.500 ms each"
    others = next(line for line in lines if "others" in line)
    assert others.split() == ["16", "others", "197,520", "0.160", "10.7%"]


def test_the_first_steps_are_not_recorded() -> None:
    profile = Profile(1, to_go=3, device=torch.device("cpu"), native=True)
    found = []
    for step in (1, 2, 3):
        profile.begin()
        with trace.stage("step"):
            pass
        found.append(profile.end(step, last=False))
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert found[2].steps == [3]
