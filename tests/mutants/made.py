"""The mutants of a module: its text with one small change each, made by mutmut's operators and two more.

Left out by rule, because no behaviour hangs on it: type annotations, decorators, docstrings, asserts,
the words of messages (what an error is called with but for `path` and `line`, names `fix` are given,
strings with a space), `encoding=` (tests/test_layout.py holds that it is given), `indent=` of JSON and
`strict=` of zip. Of mutmut's changes of one string only XX...XX is taken, and of those of one argument
only the one that leaves it out, or makes None of it where it is the only one.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst
from mutmut.mutation import mutators

SKIPPED = (cst.Annotation, cst.Decorator, cst.Assert)
# What mutmut has for these is taken from it only in part.
STRINGS, ARGUMENTS = mutators.operator_string, mutators.operator_arg_removal
OTHERS = [
    (kind, operator)
    for kind, operator in mutators.mutation_operators
    if operator not in (STRINGS, ARGUMENTS)
]
NO_BEHAVIOUR = {"encoding", "indent", "strict", "fix"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """`text` is the whole module; `change` says in one line what is another in it."""

    function: str
    change: str
    text: str


def mutants(text: str, functions: frozenset[str] | None) -> list[Mutant]:
    """All of a module, or of these functions. Their order and names depend on the text alone."""
    module = cst.parse_module(text)
    found: list[Mutant] = []
    seen: Counter[tuple[str, str]] = Counter()
    texts = {text}
    end = 0
    for statement in module.body:
        own = module.code_for_node(statement)
        start = text.index(own, end)
        end = start + len(own)
        for name, function in _functions(statement):
            if functions is not None and name not in functions:
                continue
            for node, changed in _changes(function):
                other = module.code_for_node(statement.deep_replace(node, changed))
                mutated = text[:start] + other + text[end:]
                if mutated in texts or not _compiles(mutated):
                    continue
                texts.add(mutated)
                change = _said(own, other)
                seen[name, change] += 1
                number = seen[name, change]
                found.append(Mutant(name, change if number == 1 else f"{change} (#{number})", mutated))
    return found


def _functions(statement: cst.CSTNode) -> Iterator[tuple[str, cst.FunctionDef]]:
    """A function, or a class's methods, by name; what is nested belongs to the outer one."""
    if isinstance(statement, cst.FunctionDef):
        yield statement.name.value, statement
    elif isinstance(statement, cst.ClassDef):
        for inner in statement.body.body:
            if isinstance(inner, cst.FunctionDef):
                yield f"{statement.name.value}.{inner.name.value}", inner


def _changes(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    if isinstance(node, SKIPPED) or _is_docstring(node):
        return
    for changed in _of(node):
        yield node, changed
    for child in node.children:
        if not _is_said(node, child):
            yield from _changes(child)


def _of(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in OTHERS:
        if isinstance(node, kind) and not (isinstance(node, cst.Assign) and _names_fix(node)):
            yield from operator(node)
    if isinstance(node, cst.SimpleString) and " " not in node.value:
        yield from list(STRINGS(node))[:1]
    if isinstance(node, cst.Call):
        yield from _arguments(node)
    # Two that mutmut does not have: a condition the other way round, a call that is left out.
    if isinstance(node, cst.If | cst.While):
        inside = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), inside))
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield cst.Expr(cst.Name("None"))


def _arguments(call: cst.Call) -> Iterator[cst.Call]:
    for at, given in enumerate(call.args):
        if _is_said(call, given):
            continue
        if len(call.args) > 1:
            yield call.with_changes(args=[*call.args[:at], *call.args[at + 1 :]])
        elif not given.star and given.value.deep_equals(cst.Name("None")) is False:
            yield call.with_changes(args=[given.with_changes(value=cst.Name("None"))])


def _is_said(parent: cst.CSTNode, child: cst.CSTNode) -> bool:
    """Whether this argument holds words for people, or something else without behaviour."""
    if not isinstance(parent, cst.Call) or not isinstance(child, cst.Arg):
        return False
    if child.keyword is not None and child.keyword.value in NO_BEHAVIOUR:
        return True
    name = parent.func.value if isinstance(parent.func, cst.Name) else ""
    return name.endswith("Error") and name != "OSError" and child.keyword is None


def _names_fix(node: cst.Assign) -> bool:
    target: Any = node.targets[0].target
    return isinstance(target, cst.Name) and target.value in NO_BEHAVIOUR


def _is_docstring(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _said(old: str, new: str) -> str:
    """What was there => what is there now: the lines that differ, as one."""
    sides: dict[str, list[str]] = {"-": [], "+": []}
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0):
        if line[0] in sides and not line.startswith(("---", "+++")):
            sides[line[0]].append(line[1:].strip())
    return " => ".join(" ".join(side) or "(nothing)" for side in sides.values())
