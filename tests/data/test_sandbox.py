"""Templates come from model files: what they may do, and what stops those that do more."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from bad.templates import BOMBS, ESCAPES, NESTED, SLOW
from lorimer.data import sandbox
from lorimer.data.sandbox import CompiledTemplate
from lorimer.errors import TemplateError

VARIABLES = {"messages": [{"role": "user", "content": "x"}], "given": {"a": 1}, "n": 999_999_999}


def render(source: str) -> str:
    return CompiledTemplate(source).render(VARIABLES)


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_leads_out_of_the_sandbox(source: str) -> None:
    before = repr(VARIABLES)
    with pytest.raises(TemplateError):
        render(source)
    assert repr(VARIABLES) == before


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped_before_it_grows(name: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateError):
        render(BOMBS[name])
    assert time.process_time() - start < 30  # not a speed: one that grows takes minutes or all memory


@pytest.mark.parametrize("name", SLOW)
def test_what_takes_long_is_stopped_in_any_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    found: list[str] = []

    def try_it() -> None:
        try:
            CompiledTemplate(SLOW[name]).render(VARIABLES, place="rows.jsonl:3")
        except TemplateError as error:
            found.append(error.problem)

    threads = [threading.Thread(target=try_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["rows.jsonl:3: the chat template took longer than 0.1 s"] * 2
    assert render("{{ messages[0].role }}") == "user"  # and the next render is not disturbed


@pytest.mark.parametrize("source", NESTED)
def test_a_template_that_nests_too_deeply_is_an_error(source: str) -> None:
    with pytest.raises(TemplateError, match="nests too deeply"):
        CompiledTemplate(source)


@pytest.mark.parametrize(
    "join", ["'a' + message.content", "'a' ~ message.content", "message.content | trim"]
)
def test_a_long_message_is_rendered_whole(join: str) -> None:
    content = "word " * 2_000_000 + "end"
    source = "{% for message in messages %}{{ " + join + " }}{% endfor %}"
    text = CompiledTemplate(source).render({"messages": [{"role": "user", "content": content}]})
    assert text.removeprefix("a") == content


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ 'a-b'|replace('-', '+') }}", "a+b"),
        ("{{ 'aaa'|replace('a', 'b', 2) }}", "bba"),
        ("{{ 'aaa'.replace('a', 'b', 1) }}", "baa"),
        ("{{ [1, 'b', 3]|join(', ') }}", "1, b, 3"),
        ("{{ messages|join(', ', attribute='role') }}", "user"),
        ("{{ messages|map(attribute='content')|join }}", "x"),
        ("{{ '-'.join(messages|map(attribute='role')) }}", "user"),
        ("{{ '%s is %d'|format('a', 3) }}", "a is 3"),
        ("{{ '%(k)s'|format(k='v') }}", "v"),
        ("{{ '{} {b:>4}'.format('a', b=1) }}", "a    1"),
        ("{{ 'abc'|list }}", "['a', 'b', 'c']"),
        ("{{ given }}", "{'a': 1}"),
        ("{{ none }} {{ true }} {{ 1.5 }} {{ missing }}", "None True 1.5 "),
        ("{{ {'b': '<&>é', 'a': [1, none]}|tojson }}", '{"b": "<&>é", "a": [1, null]}'),
        ("{{ given|tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ 'x\\ny'|indent(2) }}|{{ 'x\\ny'|indent(2, true) }}", "x\n  y|  x\n  y"),
        ("{{ ' x '|trim }}{{ 'x'|upper }}{{ 'X'|lower }}{{ 'ab'|title }}{{ 3|string }}", "xXxAb3"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' a'.lstrip() }}{{ 'ab'.startswith('a') }}", "baTrue"),
        ("{{ [1] + [2] }}{{ 2 * 'ab' }}{{ 1 + 2 * 3 }}{{ 'a' ~ 1 ~ none }}", "[1, 2]abab7a1None"),
        (
            "{% set s = namespace(n=0) %}{% for i in [1, 2] %}{% set s.n = s.n + i %}{% endfor %}{{ s.n }}",
            "3",
        ),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
    ],
)
def test_what_templates_use_works_as_in_jinja(source: str, wanted: str) -> None:
    assert render(source) == wanted


def test_a_render_changes_nothing_of_the_next() -> None:
    template = CompiledTemplate("{% set ns = namespace(n=1) %}{{ ns.n }}{{ x }}")
    assert [template.render({"x": n}) for n in range(3)] == ["10", "11", "12"]


def test_the_watchdog_lets_the_process_end() -> None:
    code = "from lorimer.data.sandbox import CompiledTemplate as C; print(C('{{ 1 }}').render({}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1\n"
