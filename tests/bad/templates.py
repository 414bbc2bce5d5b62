# ruff: noqa: E501  (tables)
"""Chat templates, which come with models from anywhere. Files lie in templates/; what attacks is listed here.

tests/data/test_sandbox.py renders the attacks, and holds that nothing was changed by them.
"""

from __future__ import annotations

from bad.case import Case, kept, put

FILE = "base/chat_template.jinja"
GROW = (
    "{%% set ns = namespace(x='aaaaaaaa') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
BIG = "{% set x = 'a' * 900000 %}"
NEST = "{% set ns = namespace(x=[0]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
DEEP = "{% set ns = namespace(x=[0]) %}{% for i in range(9000) %}{% set ns.x = [ns.x] %}{% endfor %}"

# Ways out of the sandbox, from lists of template injections.
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

# What grows without end.
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

# What takes long, and needs no memory.
SLOW = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
}

# What is too deep for the compiler.
NESTED = [
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{{ " + "-" * 20000 + "1 }}",
    "".join(f"{{% for a{i} in range(2) %}}" for i in range(60)) + "{% endfor %}" * 60,
    "{{ 1" + "+1" * 20000 + " }}",
    "{% if a %}" + "{% elif b %}" * 5000 + "{% endif %}",
]


def file(what: str, name: str, *says: str) -> Case:
    return Case(what, kept(f"templates/{name}", FILE), ("template", *says))


def attack(what: str, source: str) -> Case:
    return Case(what, put(FILE, source), ("the chat template", "data.chat_template"))


CASES = [
    # the file
    Case("Latin-1", put(FILE, "{{ 'é' }}".encode("latin-1")), ("chat_template.jinja", "cannot be read", "UTF-8")),
    Case("a megabyte", put(FILE, "{# x #}" * 150_000), ("the chat template has 1,050,000 characters", "data.chat_template")),
    Case("a file of another model that is none", put("other.jinja", "{% if"), ("not valid, line 1", "data.chat_template"),
         ("train", "c.yaml", "data.chat_template=other.jinja")),
    # Jinja
    file("a loop that stays open", "loop-stays-open.jinja", "not valid, line 3", "data.chat_template"),
    file("a brace is missing", "brace-missing.jinja", "not valid, line 2", "data.chat_template"),
    file("a filter that is not known", "filter-unknown.jinja", "shout", "data.chat_template"),
    file("a test that is not known", "test-unknown.jinja", "polite", "data.chat_template"),
    file("a tag that is not known", "tag-unknown.jinja", "unknown tag 'render'", "data.chat_template"),
    file("a mark of what is generated that stays open", "generation-stays-open.jinja", "not valid, line 1", "data.chat_template"),
    # what it does with a chat
    file("text and a number", "text-plus-number.jinja", "train.jsonl:1", "line 1", "data.chat_template"),
    file("a message that is not there", "message-99.jinja", "train.jsonl:1", "line 1", "data.chat_template"),
    file("a division by zero", "divides-by-zero.jinja", "train.jsonl:1", "line 1", "data.chat_template"),
    file("users are refused", "refuses-users.jinja", "train.jsonl:1", "only system messages here", "Check the roles"),
    file("the row would be changed", "changes-the-row.jinja", "train.jsonl:1", "data.chat_template"),
    file("macros that call each other", "macros-in-a-circle.jinja", "train.jsonl:1", "calls itself too often", "data.chat_template"),
    # what would be trained
    file("the answer is left out", "answer-left-out.jinja", "train.jsonl:1", "leaves the answers out", "data.chat_template"),
    file("the same for every row", "same-for-every-row.jinja", "train.jsonl:1", "leaves the answers out", "data.chat_template"),
    # attacks
    *(attack(source, source) for source in ESCAPES),
    *(attack(what, source) for what, source in [*BOMBS.items()][::5]),
    *(attack(what, source) for what, source in SLOW.items()),
    *(attack(f"nested: {source[:24]}", source) for source in NESTED),
]  # fmt: skip
