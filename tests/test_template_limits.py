"""Chat templates of strangers: what takes a machine is one line, what people use is as ever."""

import json
import random
import resource
import time
from typing import Any

import jinja2
import jinja2.ext
import pytest

from train.data import template_budget
from train.data.chat_templates import render
from train.data.template_limits import LONGEST_TEMPLATE

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a", "n": 3}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is it?\nSay <it> & 'more'"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": '{"found": 3}'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is é 中."},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image"}]},
]
DOUBLE = "{% set n = namespace(s=START) %}{% for i in range(60) %}{% set n.s = GROW %}{% endfor %}"


def double(start: str, grow: str, end: str = "{{ n.s }}") -> str:
    return DOUBLE.replace("START", start).replace("GROW", grow) + end


CHANGED = (
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}"
    "{% for x in [n.a, n.b] %}{{ loop.changed(x) }}{% endfor %}"
)
HOSTILE = {
    "{{ '%999999999d' % 1 }}": "a width of 999999999 is above the limit of 10000",
    "{{ '%*d' % (999999999, 1) }}": "a width of \\*",
    "{{ '%.999999999f'|format(1.0) }}": "a width of 999999999 is above",
    "{{ '%9999d' * 1000 % (1,) }}": "a format|not enough arguments",
    "{{ ('%(a)9999d' * 10000) % {'a': 1} }}": "a format, a text of .* characters, takes more than",
    "{{ '{:999999999d}'.format(1) }}": "a width of 999999999 is above",
    double("[1]", "[n.s, n.s]", "{{ '{}'.format(n.s) }}"): "the call of format takes more",
    "{{ '{0:{1}}'.format(1, 999999999) }}": "a width of {} in a format",
    "{{ '{:999999999}'.format_map({}) }}": "a width of 999999999 is above|index",
    "{{ 9**(9**9) }}": "9\\*\\*387420489 is an integer of more than 256 bits",
    "{{ (2**255) * (2**255) }}": "is an integer of more than 256 bits",
    "{{ 'a' * 10**12 }}": "the operator \\* by 1000000000000 takes more than the .* steps",
    "{{ [0] * 10**10 }}": "the operator \\* by 10000000000 takes more",
    "{{ 'a'.center(10**11) }}": "center of 100000000000 is above the limit of 10000",
    "{{ 'a'.zfill(10**11) }}": "zfill of 100000000000 is above",
    "{{ 'a'|center(10**11) }}": "the filter center of 100000000000 is above",
    "{{ 'a\n'|indent(10**11) }}": "the filter indent of 100000000000 is above",
    "{{ ('\n' * 100000)|indent('a' * 100000) }}": "the filter indent, a text of .* takes more",
    "{{ ('\t' * 100000).expandtabs(100000) }}": "access to attribute 'expandtabs' .* is unsafe",
    "{{ (1).to_bytes(10**10, 'big') }}": "access to attribute 'to_bytes' .* is unsafe",
    "{{ ('a' * 1000).translate({97: 'b' * 100000}) }}": "'translate' .* is unsafe",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}": "replace, a text of .* takes more",
    "{{ ('a' * 100000).replace('', 'b' * 100000) }}": "replace, a text of .* takes more",
    "{{ ('b' * 100000).join('a' * 100000) }}": "join, a text of .* takes more",
    "{{ range(100000)|join('b' * 100000) }}": "the filter join takes more",
    "{{ range(10**10)|list }}": "Range too big",
    "{{ range(100000)|map('center', 10000)|join }}": "the filter center takes more",
    "{{ lipsum(n=10**9) }}": "'lipsum' is undefined",
    "{{ [[1]]|batch(10**10, 0)|list }}": "the filter batch of 10000000000 is above",
    "{{ 'a b'|wordwrap(1, wrapstring='b' * 100000) }}": "No filter named 'wordwrap'",
    "{{ 1.5|round(10**9, 'ceil') }}": "the filter round of 1000000000 is above",
    "{{ range(100000)|batch(1)|sum(start=[]) }}": "the filter sum adds numbers alone",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more",
    "{% set x = range(9999)|list %}{%for i in x%}{% for j in x if 0 %}{% endfor %}{%endfor%}": "a",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(500) }}": "takes|recursion",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}": "",
    double("'ab'", "n.s + n.s"): "the operator \\+ takes more than the 40\\d,\\d{3} steps it may",
    double("'ab'", "n.s ~ n.s"): "the operator ~ takes more",
    double("'ab'", "'%s%s' % (n.s, n.s)"): "a format, a text of .* takes more",
    double("'ab'", "n.s|replace('', n.s)"): "replace, a text of .* takes more",
    double("'ab'", "[n.s, n.s]|join"): "the filter join takes more",
    double("'ab'", "(n.s|list + n.s|list)|join"): "takes more",
    double("[1]", "[n.s, n.s]"): "the output takes more",
    double("[1]", "[n.s, n.s]", "{{ n.s|tojson }}"): "the filter tojson takes more",
    double("[1]", "[n.s, n.s]", "{{ n.s == n.s[:] }}"): "a comparison takes more",
    double("(1,)", "(n.s, n.s)", "{{ {n.s: 1} }}"): "a comparison takes more",
    double("(1,)", "(n.s, n.s)", "{{ {}[n.s] }}"): "a comparison takes more",
    double("(1,)", "(n.s, n.s)", "{{ {}.get(n.s) }}"): "the call of get takes more",
    double("(1,)", "(n.s, n.s)", "{{ [n.s]|unique|list }}"): "the filter unique takes more",
    double("namespace()", "namespace(a=n.s, b=n.s)"): "the output takes more",
    "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}": "the output t",
    "{{ ('%(a(b)c)999999999d' % {'a(b)c': 1})|length }}": "a width of 999999999 is above",
    "{{ ('%(a\nb)999999999d' % {'a\nb': 1})|length }}": "a width of 999999999 is above",
    "{{ ('%(' + 'a(b)c' + ')999999999d')|format(**{'a(b)c': 1}) }}": "a width of 999999999 is",
    "{{ ('%%%999999999d' % 1)|length }}": "a width of 999999999 is above",
    "{{ '%999999999d' is odd }}": "a width of 999999999 is above",
    "{{ '%999999999d' is divisibleby 1 }}": "a width of 999999999 is above",
    "{{ ('%(' * 20000) % 1 }}": "incomplete format key|requires a mapping",
    "{{ ('%(' * 20000) % {'a': 1} }}": "incomplete format key",
    "{{ ('%(' * 9999 + ')' * 9999) % {'a': 1} }}": "\\(",
    "{{ ('%' * 40001) % () }}": "incomplete format",
    "{{ '%999999999d'.encode() % 1 }}": "access to attribute 'encode' .* is unsafe",
    "{{ ('a'|attr('encode'))() }}": "access to attribute 'encode' .* is unsafe",
    "{{ ('f' * 1000000)|int(0, 16) }}": "the filter int makes is an integer of more than 256 bits",
    "{{ 0x" + "f" * 100_000 + " // 7 }}": "400000 bits is an integer of more than 256 bits",
    "{{ 0x" + "f" * 100_000 + " }}": "400000 bits is an integer of more than 256 bits",
    "{{ n // 7 }}": "//7 is an integer of more than 256 bits",
    "{{ 7 % n }}": "7%.* is an integer of more than 256 bits",
    double("1", "n.s + n.s * 9999"): "is an integer of more than 256 bits",
    double("2**127", "n.s - (0 - n.s * n.s)"): "is an integer of more than 256 bits",
    "{{ ([2**127 * 2**127] * 4)|sum }}": "sum makes is an integer of more than 256 bits",
    "{{ ('x\r' * 90000)|indent('a' * 90000) }}": "the filter indent, a text of .* takes more",
    "{{ ('1' * 90000)|replace(1, 'b' * 90000) }}": "replace, a text of .* takes more",
    "{{ 'a'|round(9, 'ceil') }}": "the filter round takes numbers alone",
    "{{ range(99)|list|tojson(separators=('b' * 90000, ':')) }}": "tojson, a text of .* takes",
    "{{ ('a' * 990000).strip('b' * 990000 + 'a') }}": "the call of strip takes more",
    "{{ ('a' * 990000)|trim('b' * 990000 + 'a') }}": "the filter trim takes more",
    "{{ ('a' * 990000).rfind('ab' + 'a' * 400000) }}": "the call of rfind takes more",
    "{{ ('a' * 990000).rsplit(sep='ab' + 'a' * 400000) }}": "the call of rsplit takes more",
    "{{ 1|pprint }}": "No filter named 'pprint'",
    "{{ {'a': 1}.items().mapping.copy() }}": "access to attribute 'mapping' .* is unsafe",
    CHANGED: "the call of changed takes more",
    double("[1]", "[n.s, n.s]", "{{ {'a': n.s}.values() }}"): "the output takes more",
    double("(1,)", "(n.s, n.s)", "{{ {'a': n.s}.items() - [1] }}"): "the operator - takes more",
    double("(1,)", "(n.s, n.s)", "{{ n.s is filter }}"): "a comparison takes more",
    double("(1,)", "(n.s, n.s)", "{{ [1]|select(n.s)|list }}"): "the filter select takes more",
    double("(1,)", "(n.s, n.s)", "{{ [1]|map(n.s)|list }}"): "the filter map takes more",
    double("(1,)", "(n.s, n.s)", "{{ 1|attr(n.s) }}"): "the filter attr takes more",
    double("(1,)", "(n.s, n.s)", "{{ 1|round(0, n.s) }}"): "the filter round takes more",
    double("[1]", "[n.s, n.s]", "{{ 'a'|replace(n.s, '') }}"): "the filter replace takes more",
    double("[1]", "[n.s, n.s]", "{{ [1]|join(n.s) }}"): "the filter join takes more",
    double("[1]", "[n.s, n.s]", "{{ raise_exception(n.s) }}"): "raise_exception takes more",
    double("(1,)", "(n.s, n.s)", "{{ namespace([(n.s, 1)]) }}"): "the call of Namespace takes more",
    "{{ strftime_now('%Y' * 100000) }}": "strftime_now takes up to 100 characters",
    "{% for i in range(99999) %}" + "a" * 100_000 + "{% endfor %}": "a loop takes more",
    "a" * (LONGEST_TEMPLATE + 1): "it has 200,001 characters, more than 200,000",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
    "{{ raise_exception('a' * 100000) }}": "a{300}$",
}


@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[-40:])
def test_a_hostile_template_is_one_line_soon(template: str):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(
        ValueError, match=f"^the model's template fails: .*({HOSTILE[template]})"
    ) as e:
        render(template, [], n=10**100, source="the model's template")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert time.thread_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_clock_stands_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_budget, "SECONDS", 0.0)
    with pytest.raises(ValueError, match="fails: the operator .* by 10000 takes more than the 0 s"):
        render("{{ 'a' * 10000 }}", [])


def test_a_percent_format_is_read_as_python_reads_it():
    class Values(dict[str, int]):
        def __missing__(self, key: str) -> int:
            return 1

    rng, read = random.Random(0), 0
    for _ in range(5000):
        key = "".join(rng.choices("%()a\n", k=rng.randint(0, 6)))
        rest = "".join(rng.choices(" 0-#.979", k=rng.randint(0, 5))) + rng.choice("%ldsf")
        text = f"%({key}){rest}{rng.choice(['', '%%', '%d'])}"
        try:
            made = text % Values()
        except (TypeError, ValueError):
            continue
        parts = list(template_budget.percent_widths(text))
        widths = sum(int(part) for pair in parts for part in pair if part)
        assert len(made) <= len(text) + widths + 9 * len(parts), text
        read += widths > 0
    assert read > 100


LLAMA3 = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}
{%- set system = '' %}{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- for t in tools %}
{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{%- endif %}{{- system + '<|eot_id|>' }}
{%- for m in messages %}{%- if not (m.role == 'tool' or 'tool_calls' in m) %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | string | trim }}
{%- elif 'tool_calls' in m %}{%- if not m.tool_calls|length == 1 %}
{{- raise_exception('one call at a time') }}{%- endif %}{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
{%- else %}{{- m.content }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"""
QWEN25 = """{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
{{- '\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}{%- endif %}{%- for message in messages %}
{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' ~ message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == "tool" %}
{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
{{- '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' ~ message.content }}
{%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
{%- elif message.role == "assistant" %}{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}{%- if call.function is defined %}
{%- set call = call.function %}{%- endif %}{{- '\n<tool_call>\n{"name": "' }}{{- call.name }}
{{- '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"""
QWEN3 = """{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi and message.role == "user" and not (message.content is string and
message.content.startswith('<tool_response>')) %}{%- set ns.multi = false %}
{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}
{%- if message.content is string %}{%- set content = message.content %}{%- else %}
{%- set content = '' %}{%- endif %}{%- set reasoning = '' %}{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if loop.index0 < ns.last and reasoning %}{{- '<think>\n' + reasoning + '\n</think>\n\n' }}
{%- endif %}{{- content }}{{- '<|im_end|>\n' }}{%- endfor %}"""
CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ 'x' }}{% endif %}
{{'<|im_start|>' + m['role'] + '\n' + m['content'] | string + '<|im_end|>' + '\n'}}{% endfor %}"""
MISTRAL = """{%- set loop_messages = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- set users = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}{%- for message in loop_messages %}{%- if message["role"] == "user" %}
{%- if tools is not none and (message == users[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
{%- for key, val in tool.items() if key != "return" %}{%- if val is string %}
{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{{- "}}" }}{%- endfor %}
{{- "[/AVAILABLE_TOOLS]" }}{%- endif %}{{- "[INST] " ~ message["content"] ~ "[/INST]" }}
{%- elif message.tool_calls is defined %}{{- "[TOOL_CALLS] [" }}
{%- for call in message.tool_calls %}{%- set out = call.function|tojson %}{{- out[:-1] }}
{{- ', "id": "' + '%09d' % loop.index + '"}' }}{%- endfor %}{{- "]" + eos_token }}
{%- else %}{{- " " ~ message["content"]|trim ~ eos_token }}{%- endif %}{%- endfor %}"""
GEMMA = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
{%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else "") }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}
{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}
{%- endfor -%}"""
PHI = """{% for message in messages %}{% if message['role'] in ['system', 'user'] %}
{{'<|' ~ message['role'] ~ '|>' + '\n' ~ message['content'] ~ '<|end|>' + '\n'}}
{% elif message['role'] == 'assistant' and message['content'] %}
{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{% endif %}{% endfor %}"""
MACROS = """{%- macro kind(spec, level=0) -%}{%- if spec.type == 'object' -%}{ {{ '  ' * level }}
{%- for name, value in (spec.properties or {})|dictsort -%}{{ name }}: {{ kind(value, level + 1) }}
{%- endfor -%} }{%- else -%}{{ spec.type|default('any', true) }}{%- endif -%}{%- endmacro -%}
{% for tool in tools or [] %}type {{ tool.function.name }} = {{ kind(tool.function.parameters) }}
{% endfor %}{{ messages|map(attribute='role')|join(', ') }} {{ strftime_now('%d %B %Y') }}"""
COMMAND = """{% set parts = namespace(items=[]) %}{% for m in messages %}
{% set parts.items = parts.items + [m.role|upper ~ ': ' ~ (m.content|string)[:20]] %}{% endfor %}
{{ parts.items|join('\n') | replace('<', '&lt;') }}{{ (messages|last).role|title }}
{{ messages|groupby('role')|map('first')|list }} {{ '-' * 20 }} {{ '{:>8}'.format('x') }}"""
DEEPSEEK = """{% set ns = namespace(is_first=false, is_tool=false) %}{%- for m in messages %}
{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}
{{ bos_token ~ ns.system }}{%- for m in messages %}{%- if m['role'] == 'user' %}
{%- set ns.is_tool = false -%}{{ '<|User|>' ~ m['content'] }}{%- endif %}
{%- if m['role'] == 'assistant' and m['tool_calls'] %}{%- for t in m['tool_calls'] %}
{%- if not ns.is_first %}{{ '<|tool_calls_begin|>' }}{%- set ns.is_first = true -%}{%- endif %}
{{ t['type'] + '<|sep|>' + t['function']['name'] + '\n' ~ t['function']['arguments'] }}
{%- endfor %}{%- elif m['role'] == 'assistant' %}{% set content = m['content'] %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{ '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
GATHERED = """{% set ns = namespace(text=bos_token, turns='') %}{% for m in messages %}
{% if m.content is string %}
{% set ns.text = ns.text + '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' %}
{% set ns.turns = ns.turns ~ m.role ~ ': ' ~ m.content|replace('n', 'm', count=1) %}
{% endif %}{% endfor %}{{ ns.text + ns.turns }}
{{ '%(a(b)c)5d%% %(n)-4s|' % {'a(b)c': 1, 'n': 7 // 2} }}{{ '%5.1f %s'|format(2.5, 9 - 4) }}"""
REAL = {
    name: text
    for name, text in dict(globals()).items()
    if name.isupper() and isinstance(text, str) and name not in ("DOUBLE", "CHANGED")
}


def by_jinja(template: str, messages: list[Any], **variables: Any) -> str:
    """Jinja's own environment, without a sandbox or limits."""
    marks = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    plain.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    plain.globals["strftime_now"] = lambda form: time.strftime(form)
    return plain.from_string(marks).render(
        messages=messages, add_generation_prompt=True, **variables
    )


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
def test_what_people_use_is_as_without_limits(name: str, tools: Any):
    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools}
    long = [{"role": "user", "content": f"question {n} " * 20} for n in range(1500)]
    for messages in (CHAT, CHAT[:2], long):
        found = render(REAL[name], messages, **variables)
        assert found == by_jinja(REAL[name], messages, **variables)
        assert len(found) > 20


def test_a_loop_may_gather_a_very_long_chat():
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    long = [{"role": "user", "content": f"{n} {'a' * 90}"} for n in range(5000)]
    assert render(GATHERED, long, **variables) == by_jinja(GATHERED, long, **variables)


def test_a_very_long_chat_gives_hostile_templates_little_more():
    long = [{"role": "user", "content": "a" * 9} for n in range(2000)]
    every = (
        "{% for m in messages %}{% for k in messages %}{% set x = TEXT %}{% endfor %}{% endfor %}"
    )
    gathered = "{{ messages|map(attribute='content')|join }}"
    for template, message in (
        (double("'ab'", "n.s + n.s"), "the operator \\+ keeps more"),
        (double("'ab'", "n.s ~ n.s"), "the operator ~ keeps more"),
        (every.replace("TEXT", "0"), "a loop takes more"),
        (f"{{% set t %}}{gathered}{{% endset %}}" + every.replace("TEXT", "t + t"), "takes more"),
    ):
        with pytest.raises(ValueError, match=message):
            render(template, long)


HOARDED = """{% set ns = namespace(l=0, t=messages|map(attribute='content')|join) %}
{% set t = ns.t %}{% for m in messages %}{% set ns.l = [TEXT, ns.l] %}{% endfor %}"""


@pytest.mark.parametrize("text", ["t + t + t + t", "t ~ t", "ns.t"])
def test_copies_that_a_template_keeps_are_counted(text: str):
    """Each of a thousand messages may copy all of them; a template that lists the copies may not.

    Among them a gathered text all of whose states are listed.
    """
    long = [{"role": "user", "content": "a" * 250} for _ in range(1000)]
    template = HOARDED.replace("TEXT", text)
    if text == "ns.t":
        template = template.replace("{% set ns.l", "{% set ns.t = ns.t + 'a' %}{% set ns.l")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the operator .* keeps more than 33,554,432 bytes of tex"):
        render(template, long)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
