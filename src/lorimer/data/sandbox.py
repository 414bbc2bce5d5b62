"""Jinja for chat templates, which come from model files and are not trusted.

The same extensions and globals that transformers offers, in Jinja's immutable sandbox, with limits:
the size of the template, of every string it builds and of its output, and the time it takes.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorimer.errors import TemplateError

SOURCE_LIMIT = 256 * 1024
OUTPUT_LIMIT = 1_000_000  # characters, or four times what went in if that is more
TEXT_LIMIT = 64_000_000  # characters of one text while rendering; a message itself may be long
SECONDS = 2.0
# Filters that can build a huge string from a small number, and who needs none of that in a chat.
DROPPED_FILTERS = ("center", "wordwrap", "batch", "slice", "filesizeformat", "pprint", "urlize", "random")


class _Limit(Exception):
    """A template went over a limit."""


class _TooSlow(BaseException):
    """Raised by the watchdog inside the thread that renders; not an Exception, so that nothing in
    a template's evaluation can swallow it."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark what is trained.

    Trained spans follow from the turns themselves, so its content is rendered as it is.
    """

    tags = {"generation"}  # noqa: RUF012  jinja reads this name from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
        texts = [str(part) for part in parts]
        _check(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check(len(left) + len(right))
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(count, int):
                    _check(len(sequence) * count)
            _check_number(left, right)
        elif operator == "**":
            _check_number(left, 1)
            if isinstance(right, int | float) and abs(right) > 64:
                raise _Limit("it computes a power that is too large")
        elif operator == "%" and isinstance(left, str):
            raise _Limit("it formats with %, which is not offered")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str):
            for value in (*args, *kwargs.values()):
                if isinstance(value, int):
                    _check(abs(value))
            if function.__name__ in ("replace", "join", "format", "format_map"):
                _check_growth(function, args)
        return super().call(context, function, *args, **kwargs)


def _check(length: int) -> None:
    if length > TEXT_LIMIT:
        raise _Limit("it builds a text that is too long")


def _check_number(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > 1 << 64 for value in values):
        raise _Limit("it computes a number that is too large")


def _check_growth(function: Any, args: tuple[Any, ...]) -> None:
    """An upper bound on what replace and join can make."""
    text: str = function.__self__
    if function.__name__ == "replace" and len(args) >= 2:
        _check(len(text) + len(text) * len(str(args[1])) // max(1, len(str(args[0]))))
    elif function.__name__ == "join" and args and hasattr(args[0], "__len__"):
        _check(len(text) * len(args[0]))
    elif function.__name__ in ("format", "format_map") and len(text) > 1000:
        raise _Limit("it formats a long text")


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    for name in DROPPED_FILTERS:
        environment.filters.pop(name, None)
    environment.globals.pop("lipsum", None)
    environment.filters["tojson"] = _to_json
    environment.filters["indent"] = _indent
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **rest: Any) -> str:
    """Plain JSON: chat templates do not want HTML escapes."""
    if isinstance(indent, int):
        _check(abs(indent) * 1000)
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
                f"the chat template has {len(source):,} characters (at most {SOURCE_LIMIT:,})"
            )
        try:
            self._template = ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid, line {error.lineno}: {error.message}"
            ) from error
        except RecursionError as error:
            raise TemplateError("the chat template nests too deeply") from error

    def render(self, variables: Mapping[str, Any], *, place: str = "") -> str:
        """The text. Raises TemplateError that names the row at `place`, if given, and the cause."""
        limit = max(OUTPUT_LIMIT, 4 * _size(variables))
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
            raise TemplateError(f"{where}the chat template took longer than {SECONDS:g} s") from None
        except _Limit as error:
            raise TemplateError(f"{where}the chat template was stopped: {error}") from None
        except RecursionError:
            raise TemplateError(f"{where}the chat template calls itself too often") from None
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"{where}the chat template tried what it may not: {error}") from None
        except Exception as error:
            line = _line(error)
            raise TemplateError(
                f"{where}the chat template refuses these messages{line}: {error}",
                fix="Check the roles and their order, or give another `data.chat_template`.",
            ) from error
        return "".join(parts)


def _size(value: Any) -> int:
    """Characters in all texts of a nested value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_size(item) for item in value)
    return 0


def _line(error: BaseException) -> str:
    """Jinja rewrites tracebacks so that template frames carry template lines."""
    step = error.__traceback__
    line = ""
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = f" (line {step.tb_lineno})"
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
