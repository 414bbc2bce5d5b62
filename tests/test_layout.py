"""The layout is the path of the data: what may import what, and what may not be in the source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorimer
from lorimer.config import SETTINGS

SOURCE = Path(lorimer.__file__).parent
ROOT = SOURCE.parents[1]
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# In import order: a room imports only from rooms above it. Rooms on one line do not know each other.
ROOMS = [
    ["errors"],
    ["config"],
    ["storage", "machine"],
    ["run"],
    ["bases"],
    ["kernels"],
    ["data"],
    ["quant"],
    ["model"],
    ["lora"],
    ["generate"],
    ["evaluate"],
    ["export"],
    ["train"],
    ["api"],
    ["recipes"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# The contents page and `python -m lorimer` point at rooms; the room `train` can be called.
DOORS = {"__init__.py", "__main__.py", "train/__init__.py"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every lorimer module that is imported, wherever in the file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [str(node.module)]
            if node.module == "lorimer":
                names = [f"lorimer.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "lorimer")


def test_every_room_has_its_place() -> None:
    found = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert found == LEVEL.keys()


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) not in DOORS], ids=name_of)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    for name, line in imports(TREES[path]):
        other = name.split(".")[1] if "." in name else ""
        if other in ("", "__version__", room):
            continue
        assert LEVEL[other] < LEVEL[room], f"{name_of(path)}:{line}: {room} imports {name}"


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load"),
}  # fmt: skip
ORACLES = {"transformers", "peft", "trl", "accelerate", "gguf", "bitsandbytes"}
# The extra `transformers`, which these import when a base needs it, and never before.
EXTRA = dict.fromkeys(
    ("model/foreign.py", "model/foreign_known.py", "model/foreign_spec.py"), "transformers"
)


def dangers(tree: ast.AST) -> Iterator[str]:
    """What runs code that came from a file or a text, or hands a text to a shell."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [str(getattr(node, "module", "")), *(alias.name for alias in node.names)]
            yield from (f"{line}: {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN_CALLS:
                yield f"{line}: {called.id}()"
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{line}: shell="
                if keyword.arg == "allow_pickle":
                    yield f"{line}: allow_pickle="
        elif (
            isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in FORBIDDEN_ATTRIBUTES
        ):
            yield f"{line}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_code_from_files_or_texts(path: Path) -> None:
    assert list(dangers(TREES[path])) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "torch.load(p)",
        "f = torch.load",
        "yaml.load(t, Loader=L)",
        "subprocess.run(c, shell=True)",
        "subprocess.run(c, shell=s)",
        "os.system(c)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_the_gate_sees_what_it_is_for(text: str) -> None:
    assert list(dangers(ast.parse(text)))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_oracles_of_the_tests_are_not_imported(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        found = {name.split(".")[0] for name in names} & ORACLES
        assert found <= {EXTRA.get(name_of(path))}


def test_importing_lorimer_is_light() -> None:
    heavy = [
        "torch",
        "numpy",
        "transformers",
        "fastapi",
        "uvicorn",
        "starlette",
        "flask",
        "pydantic",
        "typer",
        "rich",
    ]
    code = f"import sys, lorimer; sys.exit(' '.join(set({heavy!r}) & sys.modules.keys()) or 0)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_using_lorimer_imports_no_transformers() -> None:
    code = (
        "import sys, lorimer, lorimer.model.foreign, lorimer.train.loop; lorimer.load, lorimer.RunResult; "
        "sys.exit('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", lorimer.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lorimer, name) is not None


def test_the_room_train_can_be_called() -> None:
    import lorimer.train.loop

    assert callable(lorimer.train)
    with pytest.raises(lorimer.LorimerError, match="`base` is not given"):
        lorimer.train({})


STOPS = [
    "rows",
    "conversation",
    "tokens",
    "pack",
    "step",
    "loss",
    "checkpoint",
    "adapter",
    "answer",
    "proof",
]


def test_the_walk_names_files_that_exist_in_ten_stops() -> None:
    text = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    titles = [line.split(". ", 1)[1].lower() for line in text.splitlines() if re.match(r"## \d+\. ", line)]
    assert titles == STOPS
    sections = re.split(r"^## \d+\. .*$", text, flags=re.MULTILINE)[1:]
    for title, section in zip(STOPS, sections, strict=True):
        named = re.findall(r"`((?:src|tests)/[\w./]+)`", section)
        assert any(name.startswith("src/") for name in named), f"{title} names no file"
        for name in named:
            assert (ROOT / name).exists(), f"{title}: {name}"


def test_the_walk_names_functions_that_exist() -> None:
    text = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    defined = {
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for name in re.findall(r"`(\w+)\(\)`", text):
        assert name in defined, name


def test_every_setting_is_read_somewhere() -> None:
    read = {
        node.attr
        for path, tree in TREES.items()
        if room_of(path) not in ("config", "cli")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    unread = [key for key in SETTINGS if key.rpartition(".")[2] not in read]
    assert unread == []


@pytest.mark.trap(31)
def test_data_files_open_as_utf8() -> None:
    """The default encoding is another one on some systems."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("read_text", "write_text"):
                assert any(k.arg == "encoding" for k in node.keywords), f"{name_of(path)}:{node.lineno}"


def test_every_planted_bug_still_has_its_place() -> None:
    """tests/plants.py changes one place of the source for each; a place that is gone proves nothing."""
    from plants import PLANTS

    for plant in PLANTS:
        text = (SOURCE / plant.file).read_text(encoding="utf-8")
        assert text.count(plant.old) == 1, f"{plant.file}: {plant.what}"


def test_every_mutant_that_may_survive_still_has_its_place() -> None:
    """tests/mutants/reasons.toml says why; a reason whose line is gone says nothing."""
    entries = tomllib.loads((ROOT / "tests/mutants/reasons.toml").read_text(encoding="utf-8"))["reason"]
    for entry in entries:
        lines = (SOURCE / entry["file"]).read_text(encoding="utf-8").splitlines()
        text = " ".join(line.strip() for line in lines)
        for mutant in entry["mutants"]:
            function, _, change = mutant.partition(": ")
            old = change.partition(" => ")[0]
            assert f"def {function.rpartition('.')[2]}(" in text, f"{entry['file']}: {mutant}"
            assert old == "(nothing)" or old in text, f"{entry['file']}: {mutant}"
