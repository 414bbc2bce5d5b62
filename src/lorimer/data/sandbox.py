"""Jinja for chat templates, which come from model files and are not trusted.

The same extensions and globals that transformers offers, in Jinja's immutable sandbox, with limits:
the size of the template, of every string it builds and of its output, and the time it takes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorimer.errors import TemplateError

SOURCE_LIMIT = 256 * 1024
OUTPUT_LIMIT = 1_000_000  # characters of one text, or four times what went in if that is more
BUILT_LIMIT = 64  # times that: characters of all texts built on the way
SECONDS = 2.0
ANOTHER = "Mend the template, or give another as `data.chat_template`."
# Filters that can build a huge value from a small number; no chat needs them.
DROPPED_FILTERS = (
    *("center", "wordwrap", "batch", "slice", "filesizeformat", "pprint", "urlize", "random", "sum"),
)
# Filters that spell out or copy what they are given, however nested it is.
TEXT_FILTERS = (
    *("capitalize", "e", "escape", "forceescape", "join", "lower", "string", "striptags", "title"),
    *("tojson", "trim", "truncate", "upper", "urlencode", "wordcount", "xmlattr"),
)
# What stands around `{% generation %}` while rendering; another in each process, so that no row spells it.
MARKS = tuple(f"\ue004{secrets.token_hex(8)}{sign}\ue005" for sign in "<>")
WIDE = re.compile(r"\d{5}|\*|\{[^}]*\{")  # a width that is large, or given as an argument


class _Budget(threading.local):
    """What the render or compilation in this thread may still build, in characters."""

    limit = OUTPUT_LIMIT
    left = OUTPUT_LIMIT * BUILT_LIMIT

    def start(self, limit: int) -> None:
        self.limit, self.left = limit, limit * BUILT_LIMIT


_BUDGET = _Budget()


class _Limit(Exception):
    """A template went over a limit."""


class _TooSlow(BaseException):
    """Raised by the watchdog inside the thread that renders; not an Exception, so that nothing in
    a template's evaluation can swallow it."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark what is trained.

    Its content is rendered as it is, between two private marks that are taken out of the text again.
    """

    tags = {"generation"}  # noqa: RUF012  jinja reads this name from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in MARKS)
        return [first, *body, last]


class _Code(CodeGenerator):
    """`a ~ b` through the environment, so that its size is checked as that of `a + b` is."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Code

    def joined(self, parts: tuple[Any, ...]) -> str:
        _check(_spelled(parts))
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _check(len(left) + len(right))
                return left + right
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                _check(8 * (len(left) + len(right)))
            _check_number(left, right)
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(count, int):
                    _check(len(sequence) * count * (1 if isinstance(sequence, str) else 8))
            _check_number(left, right)
        elif operator == "**":
            _check_number(left, 1)
            if isinstance(right, int | float) and abs(right) > 64:
                raise _Limit("it computes a power that is too large")
        elif operator == "%" and isinstance(left, str):
            raise _Limit("it formats with %, which is not offered")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja puts a wrapper around format and format_map.
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(text, str):
            args = _check_method(text, function.__name__, args, kwargs)
        return super().call(context, function, *args, **kwargs)


def _check(length: int) -> None:
    """Count a text, or a list at eight a place, that is about to be built."""
    _BUDGET.left -= length
    if length > _BUDGET.limit or _BUDGET.left < 0:
        raise _Limit("it builds a text that is too long")


def _check_number(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > 1 << 64 for value in values):
        raise _Limit("it computes a number that is too large")


def _check_method(
    text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """An upper bound on what a method of a text can build; the arguments to call it with."""
    if name in ("translate", "maketrans"):
        raise _Limit(f"it calls {name}, which is not offered")
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _check(len(text) * max(1, text.count("\t")) + abs(value))
    if name == "join" and args:
        args = (list(args[0]), *args[1:])
        _check(_spelled(args[0]) + len(text) * len(args[0]))
    elif name == "replace" and len(args) >= 2:
        _check(_replaced(text, str(args[0]), str(args[1])))
    elif name in ("format", "format_map"):
        _check_format(text, "{", (args, dict(kwargs)))
    else:
        _check(len(text))
    return args


def _replaced(text: str, old: str, new: str) -> int:
    return len(text) + (text.count(old) if len(new) > len(old) else 0) * len(new)


def _check_format(text: str, sign: str, values: Any) -> None:
    if WIDE.search(text):
        raise _Limit("it formats to a width that is too large")
    _check(len(text) + text.count(sign) * (_spelled(values) + 10_000))


def _spelled(value: Any) -> int:
    """About how long this value is when spelled out. Stops counting at the limit: a value may hold
    one list many times, and that list another many times."""
    if isinstance(value, str):
        return len(value)
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item) + 4
        elif isinstance(item, dict | Mapping):  # a dict is known at once, other mappings are asked
            total += 8 * len(item)
            _stop(total)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            total += 8 * len(item)
            _stop(total)
            waiting += item
        else:
            total += 32
    return total


def _stop(total: int) -> None:
    if total > _BUDGET.limit:
        raise _Limit("it builds a text that is too long")


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    for name in DROPPED_FILTERS:
        environment.filters.pop(name, None)
    environment.globals.pop("lipsum", None)
    environment.filters |= {"tojson": _to_json, "indent": _indent, "join": _join, "list": _list}
    environment.filters |= {"replace": _replace, "format": _format}
    environment.filters |= {name: _bounded(environment.filters[name]) for name in TEXT_FILTERS}
    environment.finalize = _shown
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps what jinja marks a filter with
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check(_spelled(args))
        return function(*args, **kwargs)

    return bounded


def _shown(value: Any) -> Any:
    """What `{{ value }}` writes."""
    if not isinstance(value, str):
        _check(_spelled(value))
    return value


def _join(values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(ENVIRONMENT, attribute), values)
    parts = list(values)
    _check(_spelled(parts) + len(str(separator)) * len(parts))
    return str(separator).join(map(str, parts))


def _list(values: Iterable[Any]) -> list[Any]:
    made = list(values)
    _check(8 * len(made))
    return made


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    _check(_spelled(text))
    text, old, new = str(text), str(old), str(new)
    _check(_replaced(text, old, new))
    made: str = text.replace(old, new, -1 if count is None else count)
    return made


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    text = str(text)
    _check_format(text, "%", (args, kwargs))
    made: str = text % (kwargs or args)
    return made


def _raise(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **rest: Any) -> str:
    """Plain JSON: chat templates do not want HTML escapes."""
    if isinstance(indent, int):
        _check(abs(indent) * 1000)
        _check(abs(indent) * _spelled(value) // 4)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(int(width), 1000)
    _check(len(text) + len(space) * (text.count("\n") + 1))
    lines = str(text).split("\n")
    padded = [space + line if (line or blank) and (i or first) else line for i, line in enumerate(lines)]
    return "\n".join(padded)


ENVIRONMENT = _environment()


class CompiledTemplate:
    """A template ready to render. Raises TemplateError for one that is too long or not Jinja."""

    def __init__(self, source: str) -> None:
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(
                f"the chat template has {len(source):,} characters (at most {SOURCE_LIMIT:,})", fix=ANOTHER
            )
        _BUDGET.start(OUTPUT_LIMIT)
        try:
            with _deadline(SECONDS):  # constant expressions are computed while compiling
                self._template = ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid, line {error.lineno}: {error.message}", fix=ANOTHER
            ) from error
        except _TooSlow:
            raise TemplateError(
                f"the chat template took longer than {SECONDS:g} s to compile", fix=ANOTHER
            ) from None
        except (RecursionError, MemoryError, SyntaxError) as error:  # Python's own limits on nesting
            raise TemplateError("the chat template nests too deeply", fix=ANOTHER) from error

    def render_marked(
        self, variables: Mapping[str, Any], *, place: str = ""
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where `{% generation %}` marks it. Raises as `render` does."""
        text = self._render(variables, place)
        return (text, []) if MARKS[0] not in text else _unmarked(text)

    def render(self, variables: Mapping[str, Any], *, place: str = "") -> str:
        """The text. Raises TemplateError that names the row at `place`, if given, and the cause."""
        return self.render_marked(variables, place=place)[0]

    def _render(self, variables: Mapping[str, Any], place: str) -> str:
        limit = max(OUTPUT_LIMIT, 4 * _size(variables))
        _BUDGET.start(limit)
        parts: list[str] = []
        length = 0
        where = f"{place}: " if place else ""
        try:
            with _deadline(SECONDS):
                context = self._template.new_context(dict(variables))
                for part in self._template.root_render_func(context):
                    length += len(part)
                    if length > limit:
                        raise _Limit(f"its output is longer than {limit:,} characters")
                    parts.append(part)
        except _TooSlow:
            problem = f"{where}the chat template took longer than {SECONDS:g} s"
            raise TemplateError(problem, fix=ANOTHER) from None
        except _Limit as error:
            raise TemplateError(f"{where}the chat template was stopped: {error}", fix=ANOTHER) from None
        except RecursionError:
            raise TemplateError(f"{where}the chat template calls itself too often", fix=ANOTHER) from None
        except jinja2.exceptions.SecurityError as error:
            problem = f"{where}the chat template tried what it may not: {error}"
            raise TemplateError(problem, fix=ANOTHER) from None
        except Exception as error:
            line = _line(error, self._template)
            raise TemplateError(
                f"{where}the chat template refuses these messages{line}: {error}",
                fix="Check the roles and their order, or give another `data.chat_template`.",
            ) from error
        return "".join(parts)


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its private marks, and the stretches that were between them."""
    plain, spans, first = "", [], 0
    for part in re.split(f"({'|'.join(MARKS)})", text):
        if part == MARKS[0]:
            first = len(plain)
        elif part == MARKS[1]:
            spans.append((first, len(plain)))
        else:
            plain += part
    return plain, spans


def _size(value: Any) -> int:
    """Characters in all texts of a nested value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict | Mapping):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_size(item) for item in value)
    return 0


def _line(error: BaseException, template: jinja2.Template) -> str:
    """The template's line that was being rendered; frames carry the lines of the compiled code."""
    step = error.__traceback__
    line = ""
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = f" (line {template.get_corresponding_lineno(step.tb_lineno)})"
        step = step.tb_next
    return line


class _Watchdog:
    """One thread that stops a render that is past its deadline, whichever thread it runs in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, seconds: float) -> None:
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
        self._wake.set()

    def release(self) -> None:
        with self._lock:
            self._deadlines.pop(threading.get_ident(), None)

    def _run(self) -> None:
        while True:
            if not self._deadlines:
                self._wake.wait()
                self._wake.clear()
            time.sleep(0.05)
            with self._lock:
                now = time.monotonic()
                for thread in [t for t, end in self._deadlines.items() if end < now]:
                    del self._deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(_TooSlow)
                    )


_WATCHDOG = _Watchdog()


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    _WATCHDOG.watch(seconds)
    try:
        yield
    finally:
        _WATCHDOG.release()
