"""Templates come from model files: what they may do, and what stops those that do more."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from lorimer.data import sandbox
from lorimer.data.sandbox import CompiledTemplate
from lorimer.errors import TemplateError

VARIABLES = {"messages": [{"role": "user", "content": "x"}], "given": {"a": 1}, "n": 999_999_999}
GROW = (
    "{%% set ns = namespace(x='aaaaaaaa') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
BIG = "{% set x = 'a' * 900000 %}"
NEST = "{% set ns = namespace(x=[0]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
DEEP = "{% set ns = namespace(x=[0]) %}{% for i in range(9000) %}{% set ns.x = [ns.x] %}{% endfor %}"


def render(source: str) -> str:
    return CompiledTemplate(source).render(VARIABLES)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) ~ 1 / 0 }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ ([1]|map(attribute='__class__')|list)[0].x }}",
    "{{ messages.append(1) }}",
    "{{ messages.pop() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ given.clear() }}",
    "{% set given.a = 2 %}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{% from 'os' import path %}",
    "{{ lipsum.__globals__ }}",
    "{{ (lambda: 1)() }}",
    "{{ config.items() }}",
    "{{ request.application }}",
    "{{ ().__class__.x }}",
    "{{ dict.mro()[1] }}",
    "{{ range.__class__.x }}",
    "{{ loop.__class__.x }}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "{{ (messages|selectattr('__class__')|list)[0].x }}{{ 1 / 0 }}",
    "{{ '%s' % 1 }}",
    "{{ open('/etc/passwd') }}",
    "{{ eval('1') }}",
    "{{ __import__('os') }}",
    "{{ context.environment }}{{ 1 / 0 }}",
    "{% debug %}",
    "{% do messages.append(1) %}",
    "{{ 'x'|urlize }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_leads_out_of_the_sandbox(source: str) -> None:
    before = repr(VARIABLES)
    with pytest.raises(TemplateError):
        render(source)
    assert repr(VARIABLES) == before


BOMBS = {
    "a text times a number": "{{ 'a' * 10**9 }}",
    "a number times a text": "{{ 10**9 * 'a' }}",
    "a list times a number": "{{ ([0] * 10**9)|length }}",
    "doubling with ~": GROW % "ns.x ~ ns.x",
    "doubling with +": GROW % "ns.x + ns.x",
    "the method replace": GROW % "ns.x.replace('a', 'aaaaaaaaaaaa')",
    "replacing nothing": GROW % "ns.x.replace('', 'aaaaaaaaaaaa')",
    "a text padded": "{{ 'a'.zfill(10**9) }}",
    "a text aligned": "{{ 'a'.ljust(10**9)|length }}",
    "tabs": "{{ '\\t\\t'.expandtabs(10**9)|length }}",
    "a large power": "{{ 2 ** (2 ** 10) }}",
    "a large product": "{{ (2**60) * (2**60) * (2**60) }}",
    "a percent format": "{{ '%0999999999d' % 1 }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a loop that calls itself": "{% for x in [[]] recursive %}{{ loop([x]) }}{% endfor %}",
    "a wide range": "{% for i in range(10**9) %}{% endfor %}",
    "the filter replace": GROW % "ns.x|replace('a', 'aaaaaaaaaaaa')",
    "the filter format": "{{ '%0999999999d'|format(1)|length }}",
    "the filter format with a name": "{{ ('%0' ~ n ~ 'd')|format(1)|length }}",
    "the filter format with a star": "{{ '%*d'|format(n, 1)|length }}",
    "the method format": "{{ '{:>999999999}'.format(1)|length }}",
    "the method format, nested": "{{ '{:>{}}'.format(1, n)|length }}",
    "the method format_map": "{{ '{a:>999999999}'.format_map({'a': 1})|length }}",
    "a format that repeats": BIG + "{{ ('{0}' * 300).format(x)|length }}",
    "the method translate": BIG + "{{ x.translate({97: x})|length }}",
    "the filter join": BIG + "{{ ([x] * 4000)|join|length }}",
    "the filter join of an attribute": BIG + "{{ ([{'a': x}] * 4000)|join('', 'a')|length }}",
    "the method join": BIG + "{{ ''.join([x] * 4000)|length }}",
    "the method join of a generator": BIG + "{{ ''.join(([x] * 4000)|map('string'))|length }}",
    "a list written out": BIG + "{{ [x] * 4000 }}",
    "a list made a text": BIG + "{{ ([x] * 4000)|string|length }}",
    "a list joined to a text": BIG + "{{ ([x] * 4000) ~ '' }}",
    "JSON": BIG + "{{ ([x] * 4000)|tojson|length }}",
    "JSON with wide indents": "{{ ([[0]] * 9000)|tojson(indent=9999)|length }}",
    "lists that hold one list twice": NEST + "{{ ns.x|string|length }}",
    "the same as JSON": NEST + "{{ ns.x|tojson|length }}",
    "the same as output": NEST + "{{ ns.x }}",
    "lists in lists": DEEP + "{{ ns.x|string|length }}",
    "many large texts kept": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + ['a' * 900000 ~ i] %}{% endfor %}",
    "many lists kept": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [range(99999)|list] %}{% endfor %}",
    "lists added up": "{{ ([[0] * 1000] * 90000)|sum(start=[])|length }}",
    "a number doubled often": "{% set ns = namespace(x=3) %}{% for i in range(90000) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a constant computed while compiling": "{{ 'aaaaaaaaaa'"
    + "|replace('a', 'aaaaaaaaaa')" * 9
    + "|length }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped_before_it_grows(name: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateError):
        render(BOMBS[name])
    assert time.process_time() - start < 30  # not a speed: one that grows takes minutes or all memory


SLOW = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
}


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


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
        "{{ " + "not " * 20000 + "1 }}",
        "{{ " + "-" * 20000 + "1 }}",
        "".join(f"{{% for a{i} in range(2) %}}" for i in range(60)) + "{% endfor %}" * 60,
        "{{ 1" + "+1" * 20000 + " }}",
        "{% if a %}" + "{% elif b %}" * 5000 + "{% endif %}",
    ],
)
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
