"""Templates: what is a token, what stays as it is, and that what is inserted is not looked at again."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portexec.command.templates import FIELDS, expand, uses
from portexec.errors import PortexecError

VALUES = {
    "port": "4000",
    "host": "127.0.0.1",
    "url": "http://127.0.0.1:4000",
    "fd": "3",
    "api.port": "4000",
    "api.host": "127.0.0.1",
    "api.url": "http://127.0.0.1:4000",
    "api.fd": "3",
    "my-web_2.port": "5000",
    "sock.url": "unix:/run/s",
}

REPLACED = [
    ("{port}", "4000"),
    ("{host}", "127.0.0.1"),
    ("{url}", "http://127.0.0.1:4000"),
    ("{fd}", "3"),
    ("{api.port}", "4000"),
    ("{my-web_2.port}", "5000"),
    ("--port={port}", "--port=4000"),
    ("{host}:{port}/", "127.0.0.1:4000/"),
    ("{port}{port}", "40004000"),
    ("{{port}}", "4000"),
    ("{{api.port}}", "4000"),
    ("{{port}}{{fd}}", "40003"),
    ("{{port}", "{4000"),
    ("{port}}", "4000}"),
    ("{{{port}}}", "{4000}"),
    ("{{{{port}}}}", "{{4000}}"),
    ('{"port": {port}}', '{"port": 4000}'),
    ('{"a": {"port": {port}}}', '{"a": {"port": 4000}}'),
    ("{ {port} }", "{ 4000 }"),
    ("{foo}{port}{bar}", "{foo}4000{bar}"),
    ("{foo{port}", "{foo4000"),
    ("{}{port}", "{}4000"),
]

UNCHANGED = [
    "",
    "plain",
    "{",
    "}",
    "{}",
    "{{}}",
    "}{",
    "{port",
    "port}",
    "{{port",
    "{foo}",
    "{ port }",
    "{PORT}",
    "{port }",
    "{port:d}",
    "{port!r}",
    "{0}",
    "{.port}",
    "{a b.port}",
    "{a.b.port}",
    "{api.ports}",
    "{api.}",
    "{api.port.}",
    '{"a": 1, "b": {"c": []}}',
    "{print $1}",
    'BEGIN { FS = ":" } { print $2 }',
    "${HOME:-/root}",
    "${#array[@]}",
    "{1..10}",
    "{a,b}",
    "%{http_code}",
    "a{2,3}b",
    "{% if x %}",
    "{{ cookiecutter.name }}",
]


@pytest.mark.parametrize(("text", "expected"), REPLACED)
def test_replaced(text: str, expected: str) -> None:
    assert expand(text, VALUES) == expected


@pytest.mark.parametrize("text", UNCHANGED)
def test_other_braces_stay(text: str) -> None:
    assert expand(text, VALUES) == text


NO_VALUE = [
    ("{web.port}", VALUES, "{web.port} names no listener of this run", "the listeners are: api, my-web_2, sock"),
    ("{{web.url}}", VALUES, "{web.url} names no listener of this run", "the listeners are: api, my-web_2, sock"),
    ("ok {port} {web.fd}", VALUES, "{web.fd} names no listener of this run", "the listeners are: api, my-web_2, sock"),
    (
        "{fd}",
        {"port": "1", "listener1.port": "1"},
        "{fd} is only known with hand-off fd",
        "leave --hand-off out, or say --hand-off fd, or use {port}",
    ),
    (
        "{a.fd}",
        {"a.port": "1"},
        "{a.fd} is only known with hand-off fd",
        "leave --hand-off out, or say --hand-off fd, or use {port}",
    ),
    ("{port}", {"url": "unix:/s"}, "{port}: a unix socket has no port", "use {url}, which is unix:PATH"),
    ("{sock.host}", VALUES, "{sock.host}: a unix socket has no host", "use {sock.url}, which is unix:PATH"),
]


@pytest.mark.parametrize(("text", "values", "message", "hint"), NO_VALUE)
def test_known_in_form_but_without_a_value(text: str, values: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(PortexecError) as caught:
        expand(text, values)
    assert (caught.value.message, caught.value.hint, caught.value.status) == (message, hint, 125)


@pytest.mark.parametrize("value", ["{port}", "{{port}}", "{web.port}", "{", "}", "\\1", "%s"])
def test_a_replacement_is_not_looked_at_again(value: str) -> None:
    assert expand("<{url}{{url}}>", {"url": value, "port": "4000"}) == f"<{value}{value}>"


@pytest.mark.parametrize("text", ["{fd}", "{{fd}}", "x{api.fd}y", "{port}{fd}", "{foo} {{web.fd}}", "{fd{fd}"])
def test_uses_the_descriptor(text: str) -> None:
    assert uses(text, "fd")


@pytest.mark.parametrize("text", ["", "fd", "{port}", "{ fd }", "{FD}", "{fd", "{.fd}", "{fd.x}", "{url}"])
def test_does_not_use_the_descriptor(text: str) -> None:
    assert not uses(text, "fd")


# How long an example takes is the machine's affair.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
arguments = st.binary(max_size=60).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
pieces = st.sampled_from(["{", "}", "{{", "}}", "port", "fd", "url", "api", "web", ".", " ", "$", '"', "{port}", "{api.fd}"])
near_templates = st.lists(pieces, max_size=12).map("".join)
segments = st.one_of(
    st.sampled_from([(f"{{{name}}}", value) for name, value in VALUES.items()]),
    st.sampled_from([(f"{{{{{name}}}}}", value) for name, value in VALUES.items()]),
    st.sampled_from([(text, text) for text in UNCHANGED if text.count("{") == text.count("}")]),
    arguments.map(lambda text: text.replace("{", "").replace("}", "")).map(lambda text: (text, text)),
)


@unhurried
@given(st.one_of(arguments, near_templates), st.dictionaries(st.sampled_from(sorted(VALUES)), near_templates))
def test_any_text_gives_a_text_or_a_portexec_error(text: str, values: dict[str, str]) -> None:
    try:
        expanded = expand(text, values)
    except PortexecError:
        expanded = ""
    assert any(uses(text, field) for field in FIELDS) or expanded == text


@unhurried
@given(st.lists(segments, max_size=8))
def test_tokens_are_replaced_and_all_else_stays(parts: list[tuple[str, str]]) -> None:
    assert expand(" ".join(text for text, _ in parts), VALUES) == " ".join(value for _, value in parts)
