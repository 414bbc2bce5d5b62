"""report.html: what a run left, on one page, whatever it left."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorimer import storage
from lorimer.errors import DivergenceError, Interrupted, StorageError
from lorimer.evaluate.report import write_report
from lorimer.evaluate.run import RowScore, Scores
from lorimer.run import RunFolder

NASTY = '</pre></div><script>alert("1")</script><img src=x onerror=alert(2)>&amp;'
INFO: dict[str, Any] = {
    "run": "runs/home", "base": "tiny", "architecture": "llama", "base_parameters": 134_515_008,
    "dtype": "float32", "device": "cpu", "threads": 1, "targets": "q_proj in all 3 layers",
    "trainable": "trainable params: 4 || all params: 8 || trainable%: 50", "r": 16, "alpha": 32.0,
    "rows": 2400, "tokens": 150_000, "trained_tokens": 60_000, "shared_prefix": 24, "valid_rows": 300,
    "test_rows": 3, "steps": 40, "first_step": 0, "batch_size": 16, "micro_batch_tokens": 2048,
    "epochs": 1, "learning_rate": 1e-3, "lr_scheduler": "linear", "warmup_steps": 5,
    "template": "the base's",
}  # fmt: skip


class Page(HTMLParser):
    """A page's tags and attributes, its text, and the text of each heading's section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.heading = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open and self.open[-1] == "h2":
            self.heading = data
        self.sections[self.heading] = f"{self.sections.get(self.heading, '')} {data}"

    @property
    def text(self) -> str:
        return "\n".join(self.sections.values())


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": number, "epoch": number / 40, "loss": 4 / number, "learning_rate": 1e-3 / number,
        "grad_norm": 1.5, "rows": 16, "tokens": 900, "trained_tokens": 400, "seconds": 10.0,
        "tokens_per_second": 90.0, "memory_bytes": 3 * 2**30,
    } | changes  # fmt: skip


def scores(name: str, *answers: str, nats: float) -> Scores:
    """Three rows; the first is answered right if it is answered ON."""
    rows = [
        RowScore(f"t.jsonl:{n}", f"lamp {n}", "ON", answer, {"exact_match": float(answer == "ON")}, nats, 2)
        for n, answer in enumerate(answers, 1)
    ]
    right = sum(answer == "ON" for answer in answers) / len(answers)
    return Scores(tuple(rows), {"loss": nats / 2, "exact_match": right}, name)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run of 40 steps with everything that a run can have."""
    run = RunFolder(tmp_path / "home")
    run.eval.mkdir(parents=True)
    run.update_record(
        status="finished", steps=40, best_step=30, base="tiny", command="lorimer train my.yaml",
        version="0.1.0", versions={"torch": "2.13"}, machine={"cpu": "A CPU", "cores": 2},
        data_hash="abcdef0123456789ffff", info=INFO, load_seconds=4.0, eval_seconds=70.0,
        save_seconds=1.0, peak_memory_bytes=5 * 2**29,
    )  # fmt: skip
    lines = [step(number) for number in range(1, 41)]
    for number, loss in ((10, 0.9), (20, 0.4), (30, 0.3), (40, 0.35)):
        lines.insert(0, {"step": number, "valid_loss": loss, "best": number == 30})
    lines.sort(key=lambda line: line["step"])
    write_lines(run.metrics, lines)
    run.config.write_text("base: tiny\n", encoding="utf-8")
    run.say("2 rows are longer than 1,024 tokens and are left out")
    write_scores(run, scores("before", "no", "no", "no", nats=6), scores("after", "ON", "ON", "??", nats=2))
    write_lines(run.samples, [change(n) for n in range(1, 5)])
    return run


def change(number: int, **texts: str) -> dict[str, str]:
    return {
        "kind": "fixed", "place": f"t.jsonl:{number}", "prompt": f"lamp {number}", "reference": "ON",
        "before": "no", "after": "ON",
    } | texts  # fmt: skip


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_scores(run: RunFolder, before: Scores, after: Scores) -> None:
    for name, value in (("before", before), ("after", after)):
        (run.eval / f"{name}.json").write_text(json.dumps(value.to_json()), encoding="utf-8")


def read(run: RunFolder) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_says_what_the_folder_holds(run: RunFolder) -> None:
    page = read(run)
    proof = " ".join(page.sections["Before and after, on held-out rows"].split())
    assert "loss nats per trained token 3.0000 1.0000 -2.000 [-2.000, -2.000] 3 / 0 / 0 not clear" in proof
    assert "exact_match answers equal to the reference 0.0 % 66.7 % +66.7" in proof
    assert "2 / 0 / 1" in proof
    for section, parts in {
        "": ("home", "finished", "tiny trained on 2,400 rows: 40 steps in 6 min 40 s."),
        "Loss": ("validation loss, best 0.3000 at step 30", "training loss, mean of 5 steps"),
        "Answers that changed": ("t.jsonl:1", "t.jsonl:3", "lamp 2", "before", "no", "after", "ON"),
        "What was trained": ("LoRA r=16 alpha=32", "60,000 trained (40%)", "40 steps of 16 rows"),
        "Tokens, time and memory": (
            "36,000 in 640 rows",
            "1 min 10 s to evaluate",
            "90 tokens",
            "2.50 GiB",
        ),
        "Where it comes from": ("lorimer train my.yaml", "A CPU", "torch 2.13", "data abcdef0123456789"),
        "What the run said": ("2 rows are longer than 1,024 tokens",),
        "What next": ("lorimer chat", "lorimer eval", "lorimer merge", "vllm serve"),
        "Settings": ("base: tiny",),
    }.items():
        for part in parts:
            assert part in page.sections[section], (section, part)
    assert "t.jsonl:4" not in page.text  # three are enough


def test_the_page_needs_nothing_but_itself(run: RunFolder) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(page.tags)
    assert not {"src", "href", "action", "style"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", source)
    for part in ("prefers-color-scheme: dark", "@media print", "@media (max-width", "viewport"):
        assert part in source
    assert page.tags.count("svg") == 2


@pytest.mark.parametrize(
    "text", [NASTY, "a\x00b\x1b[31mc", "\ud800", "\u202eabc", "a\nb", "{{ name }}"], ids=ascii
)
def test_what_comes_from_data_stays_text(run: RunFolder, text: str) -> None:
    write_lines(run.samples, [dict.fromkeys(change(1), text)])
    run.config.write_bytes(f"base: {text}\n".encode("utf-8", "replace"))
    run.say(text.encode("utf-8", "replace").decode())
    run.update_record(
        base=text.encode("utf-8", "replace").decode(), command=NASTY, info=INFO | {"base": NASTY}
    )
    page = read(run)
    assert "script" not in page.tags
    assert "img" not in page.tags
    shown = re.sub(r"[\x00\x1b]", "�", text).replace("\ud800", "?")
    for section in ("", "Answers that changed", "Settings", "What the run said"):
        assert shown in page.sections[section]
    assert NASTY in page.sections["What was trained"]
    assert page.sections["Answers that changed"].count(shown) == len(change(1))


def test_a_name_of_the_folder_stays_text(run: RunFolder) -> None:
    moved = RunFolder(run.path.rename(run.path.with_name("<b>&x")))
    page = read(moved)
    assert "<b>&x" in page.sections[""]
    assert "'" in page.sections["What next"]  # quoted for a shell


def test_long_texts_are_cut_where_it_hurts_least(run: RunFolder) -> None:
    long = "begin" + "x" * 5000 + "end"
    write_lines(run.samples, [change(1, prompt=long, after=long)])
    text = read(run).sections["Answers that changed"]
    assert text.count("begin") == 1
    assert re.search(r"…x+end", text)
    assert len(text) < 4000


# What a run may lack, and what the page then says and does not say.
def _no_test(run: RunFolder) -> None:
    run.update_record(info=INFO | {"test_rows": 0})
    for path in (run.eval / "before.json", run.eval / "after.json", run.samples):
        path.unlink()


def _no_valid(run: RunFolder) -> None:
    write_lines(run.metrics, [step(number) for number in range(1, 41)])


def _one_step(run: RunFolder) -> None:
    _no_test(run)
    write_lines(run.metrics, [step(1)])
    run.update_record(info=INFO | {"steps": 1, "test_rows": 0})


def _stopped_early(run: RunFolder) -> None:
    run.update_record(info=INFO | {"steps": 400})


def _resumed(run: RunFolder) -> None:
    run.update_record(info=INFO | {"first_step": 25}, error="stopped after step 25")
    run.say("resumed after step 25 from step-000025")


def _interrupted(run: RunFolder) -> None:
    run.update_record(status="interrupted", error="stopped after step 12 of 40; the state is saved")
    write_lines(run.metrics, [step(number) for number in range(1, 13)])
    run.checkpoint(12).mkdir(parents=True)


def _failed(run: RunFolder) -> None:
    run.update_record(status="failed", error="the loss is nan at step 3")
    write_lines(run.metrics, [step(1), step(2)])


def _nothing(run: RunFolder) -> None:
    for path in (run.record, run.metrics, run.config, run.log, run.samples):
        path.unlink()


def _before_the_first_step(run: RunFolder) -> None:
    run.update_record(status="interrupted", error="KeyboardInterrupt")
    run.metrics.write_text("", encoding="utf-8")


def _cut_short(run: RunFolder) -> None:
    for path in (run.metrics, run.samples):
        content = path.read_bytes()
        path.write_bytes(content[:-20])
    (run.eval / "after.json").write_text("{", encoding="utf-8")


def _same_answers(run: RunFolder) -> None:
    same = [scores(name, "no", "no", "no", nats=2) for name in ("before", "after")]
    write_scores(run, *same)
    run.samples.write_text("", encoding="utf-8")


def _texts_only(run: RunFolder) -> None:
    rows = tuple(RowScore(f"t:{n}", "once", None, None, {}, 4.0, 2) for n in range(3))
    write_scores(run, *(Scores(rows, {"loss": 2.0, "perplexity": 7.389}, n) for n in ("before", "after")))
    run.samples.write_text("", encoding="utf-8")


def _no_clock(run: RunFolder) -> None:
    write_lines(run.metrics, [step(number, seconds=0) for number in range(1, 41)])


def _damaged(run: RunFolder) -> None:
    """Lines that no step writes are left out, as are times that are none."""
    odd: list[dict[str, Any]] = [
        step(7, seconds="x"), step(8, tokens=None), step(9, loss=[]), step(10, seconds=10**400),
        step(11, loss=float("nan")), {"loss": 1.0}, step(12) | {"step": "12"},
    ]  # fmt: skip
    write_lines(run.metrics, [step(1), *odd, step(2)])
    run.update_record(peak_memory_bytes="x", eval_seconds={}, load_seconds=True)


LACKS: dict[str, tuple[Any, list[str], list[str]]] = {
    "no test rows": (_no_test, ["kept no rows aside", "data.test_fraction"], ["won / lost", "changed"]),
    "no validation": (_no_valid, ["training loss"], ["validation loss"]),
    "one step": (_one_step, ["finished", "1 step in 10 s", "4.0000 at the end"], ["rate, by", "early"]),
    "stopped early": (_stopped_early, ["stopped early, after step 40 of 400"], []),
    "resumed": (_resumed, ["finished", "from step 26", "resumed after step 25"], ["stopped after"]),
    "interrupted": (
        _interrupted,
        ["interrupted after step 12 of 40", "the state is saved", "--resume", "when the run is finished"],
        ["lorimer chat", "won / lost", "Answers that changed", "data.test_fraction"],
    ),
    "failed": (_failed, ["failed after step 2 of 40", "nan at step 3"], ["lorimer chat", "--resume"]),
    "nothing at all": (_nothing, ["home", "no step was finished", "unknown"], ["What next", "None"]),
    "before the first step": (_before_the_first_step, ["No step was finished", "after step 0"], ["Tokens"]),
    "files cut short": (_cut_short, ["cannot be compared", "training loss"], ["won / lost"]),
    "steps of no time": (_no_clock, ["0 s in 40 steps", "not measured"], []),
    "damaged lines": (_damaged, ["20 s in 2 steps", "3.00 GiB at most"], ["to load", "to evaluate"]),
    "the same answers": (_same_answers, ["No answer changed.", "no difference"], ["no questions"]),
    "texts without questions": (_texts_only, ["nothing was answered", "0 of them"], ["exact_match"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKS)
def test_what_a_run_lacks_is_said_or_left_out(run: RunFolder, case: str) -> None:
    change_it, says, says_not = LACKS[case]
    change_it(run)
    text = read(run).text
    for part in says:
        assert part in text
    for part in says_not:
        assert part not in text


def test_the_page_of_a_long_run_stays_small(run: RunFolder) -> None:
    write_lines(run.metrics, [step(number) for number in range(1, 50_001)])
    run.update_record(info=INFO | {"steps": 50_000})
    path = write_report(run)
    assert path.stat().st_size < 60_000
    assert "each 125 steps" in Page(path.read_text(encoding="utf-8")).text


def test_writing_again_replaces_and_leaves_nothing_beside(run: RunFolder) -> None:
    write_report(run)
    names = {path.name for path in run.path.iterdir()}
    run.update_record(base="another")
    assert "another" in read(run).text
    assert {path.name for path in run.path.iterdir()} == names


def test_a_full_disk_keeps_the_old_page(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_bytes()
    run.update_record(base="another")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report(run)
    assert run.report.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "state"),
    [(Interrupted("stopped after step 1"), "interrupted"), (DivergenceError("nan"), "failed")],
)
def test_the_record_decides_the_state(run: RunFolder, error: Exception, state: str) -> None:
    run.update_record(status=state, error=str(error))
    page = read(run)
    assert str(error) in page.sections[""]
    assert ("class", f"status {state}") in page.attributes
