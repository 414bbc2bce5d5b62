# ruff: noqa: E501  (tables)
"""What runs keep: manifests, state, records, and the manifests of kept bases.

A damaged checkpoint is passed over aloud and the one before it is used, so a resumed run ends with 0;
`verify` ends with 1 where it finds damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.case import Case, Make, change, gone, put

RUN = "runs/whole"
STEP = f"{RUN}/checkpoints/step-000001"
MANIFEST, STATE = f"{STEP}/manifest.json", f"{STEP}/state.json"
RESUME = ("train", "--resume", RUN)
VERIFY = ("verify", RUN)
OPTIMIZER = "files__optimizer.safetensors"
KEPT = "../home/bases/small"


def passed_over(what: str, make: Make, *words: str) -> Case:
    """A checkpoint that is not used; there is no other, and the run begins again."""
    return Case(what, make, ("the checkpoint step-000001 is damaged and not used", *words), RESUME, code=0)


def refused(what: str, make: Make, *words: str) -> Case:
    return Case(what, make, words, RESUME)


def found(what: str, make: Make, *words: str) -> Case:
    return Case(what, make, ("BAD", *words), VERIFY, code=1)


def state(**values: Any) -> Make:
    """Another state, with a manifest that agrees with it."""
    return lambda folder: _agreed(folder, "state.json", change(STATE, **values))


def state_text(text: str) -> Make:
    return lambda folder: _agreed(folder, "state.json", put(STATE, text))


def optimizer(do: Callable[[dict[str, Any]], Any]) -> Make:
    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / STEP / "optimizer.safetensors"
        tensors = load_file(path)
        do(tensors)
        save_file(tensors, path)

    return lambda folder: _agreed(folder, "optimizer.safetensors", make)


def _agreed(folder: Path, name: str, make: Make) -> None:
    from inputs import agree

    make(folder)
    agree(folder / STEP / name)


def flipped(name: str) -> Make:
    def make(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return make


def listed(name: str) -> Make:
    """A file outside the checkpoint in its manifest, with the right size and hash."""

    def make(folder: Path) -> None:
        content = (folder / "c.yaml").read_bytes()
        whole = json.loads((folder / MANIFEST).read_text())
        facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        whole["files"][name.format(folder=folder)] = facts
        (folder / MANIFEST).write_text(json.dumps(whole))

    return make


def kept_base(manifest: str) -> Make:
    """A base of the name `small` in the folder of kept bases."""
    return put(f"{KEPT}/manifest.json", manifest)


CASES = [
    # a checkpoint's manifest
    passed_over("no manifest", gone(MANIFEST), "manifest.json is missing"),
    passed_over("a manifest that is empty", put(MANIFEST, ""), "the manifest cannot be read"),
    passed_over("a manifest that is a list", put(MANIFEST, "[]"), "the manifest cannot be read"),
    passed_over("a manifest with brackets without end", put(MANIFEST, "[" * 100_000), "the manifest cannot be read"),
    passed_over("a manifest that lists no files", change(MANIFEST, files={}), "is not in the manifest"),
    passed_over("another size", change(MANIFEST, files={"state.json": {"bytes": 1, "sha256": ""}}), "state.json has"),
    passed_over("another hash", flipped(f"{STEP}/optimizer.safetensors"), "optimizer.safetensors does not have the content"),
    passed_over("a file is missing", gone(f"{STEP}/optimizer.safetensors"), "optimizer.safetensors is missing"),
    passed_over("a file too many", put(f"{STEP}/adapter_model.bin", b"\x80\x02}"), "adapter_model.bin is not in the manifest"),
    passed_over("a file outside the folder", listed("../../../../c.yaml"), "which is no file of this folder"),
    passed_over("a file at the root", listed("{folder}/c.yaml"), "is no file of this folder"),
    passed_over("a file that is a folder", lambda f: ((f / STATE).unlink(), (f / STATE).mkdir()), "state.json"),
    # a state with a manifest that agrees
    refused("a state of another format", state(format=1), "step-000001", "the format 1", "Resume it with the version"),
    refused("a state that is a list", state_text("[]"), "state.json", "Delete"),
    refused("a state that is not JSON", state_text("{"), "state.json", "Delete"),
    refused("a step that is text", state(step="one"), "state.json", "`step`", "Delete"),
    refused("a negative step", state(step=-1), "state.json", "`step`", "Delete"),
    refused("a step of another folder", state(step=7), "state.json", "`step`", "Delete"),
    refused("a setting that is not known", state(mood="good"), "the format 2", "Resume it with the version"),
    refused("a best loss that is text", state(best_loss="low"), "state.json", "`best_loss`", "Delete"),
    refused("an optimizer without its state", optimizer(lambda t: t.clear()), "optimizer.safetensors", "Delete"),
    refused("an optimizer of another shape", optimizer(lambda t: t.update({k: v[:5].clone() for k, v in t.items() if v.ndim})), "optimizer.safetensors", "Delete"),
    refused("an optimizer with NaN", optimizer(lambda t: [v.fill_(float("nan")) for v in t.values() if v.is_floating_point()]), "optimizer.safetensors", "holds NaN", "Delete"),
    # the rest of a run
    refused("no settings", gone(f"{RUN}/config.yaml"), "there is no run", "config.yaml", "or `last`"),
    refused("settings that are cut off", put(f"{RUN}/config.yaml", "base: ["), "config.yaml:1: this is not YAML", "Look at"),
    refused("a record with a time that is none", change(f"{RUN}/run.json", started="yesterday"), "run.json: `started` is 'yesterday'", "Write the time as"),
    refused("other rows than it was begun with", state(data_hash="0" * 64), "the data is not what this run was begun with", "Put the files back"),
    Case("steps with bytes that are no text", put(f"{RUN}/metrics.jsonl", b'{"step": 1, "loss": 1.0, "a": "\xff"}\n'), ("resumed after step 1",), RESUME, code=0),
    Case("steps with a loss that is text", put(f"{RUN}/metrics.jsonl", '{"step": 1, "loss": "low"}\n'), ("resumed after step 1",), RESUME, code=0),
    Case("losses of rows that are none", put(f"{RUN}/row_losses.jsonl", '{"step": 1, "rows": 3, "losses": [1.0]}\n[]\n'), ("resumed after step 1",), RESUME, code=0),
    found("a manifest with half of an emoji", put(MANIFEST, '{"files": {"\\ud800": {"bytes": 1, "sha256": ""}}}'), "checkpoints/step-000001", "the manifest cannot be read"),
    found("a record that is cut off", put(f"{RUN}/run.json", "{"), "run.json"),
    found("a record with brackets without end", put(f"{RUN}/run.json", "[" * 100_000), "run.json"),
    found("steps that are cut off", put(f"{RUN}/metrics.jsonl", '{"step": 1, "lo'), "metrics.jsonl", "line 1 cannot be read"),
    found("steps out of order", put(f"{RUN}/metrics.jsonl", '{"step": 2, "loss": 1.0}\n'), "metrics.jsonl", "is step 2 (wanted: 1)"),
    found("a loss of NaN", put(f"{RUN}/metrics.jsonl", '{"step": 1, "loss": NaN}\n'), "metrics.jsonl", "the loss nan"),
    found("a loss that is text", put(f"{RUN}/metrics.jsonl", '{"step": 1, "loss": "low"}\n'), "metrics.jsonl", "line 1"),
    found("steps with brackets without end", put(f"{RUN}/metrics.jsonl", "[" * 100_000), "metrics.jsonl", "line 1"),
    # bases that are kept
    Case("a kept base whose file is gone", kept_base('{"name": "small", "files": {"m.gguf": {"bytes": 4}}}'),
         ("the kept base `small` is damaged: m.gguf is missing", "lorimer rm small && lorimer pull small"), ("show", "small")),
    Case("a kept base with a file outside", kept_base('{"name": "small", "files": {"../../../x/base.gguf": {"bytes": 4}}}'),
         ("the kept base `small` is damaged: its manifest lists", "lorimer rm small"), ("show", "small")),
    Case("a kept base that lists no files", kept_base('{"name": "small", "files": []}'),
         ("the kept base `small` is damaged: its manifest lists no files", "lorimer rm small"), ("show", "small")),
    Case("a kept base whose manifest is cut off", kept_base('{"name": '), ("there is no base `small`", "Known to pull"), ("show", "small")),
]  # fmt: skip
