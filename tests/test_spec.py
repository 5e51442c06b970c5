"""Listen specs: every form of the grammar, every malformed one with its message, and what holds for any text at all."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from portexec.binding.spec import ListenSpec, is_name, parse_listen, variable_of
from portexec.errors import PortexecError

ANY = ((0, 0),)

# text, kind, address, candidates, how it is written in full
FORMS = [
    ("0", "tcp", "127.0.0.1", ANY, "127.0.0.1:0"),
    ("8000", "tcp", "127.0.0.1", ((8000, 8000),), "127.0.0.1:8000"),
    ("1", "tcp", "127.0.0.1", ((1, 1),), "127.0.0.1:1"),
    ("65535", "tcp", "127.0.0.1", ((65535, 65535),), "127.0.0.1:65535"),
    ("08000", "tcp", "127.0.0.1", ((8000, 8000),), "127.0.0.1:8000"),
    ("3000,0", "tcp", "127.0.0.1", ((3000, 3000), (0, 0)), "127.0.0.1:3000,0"),
    ("8000-8099", "tcp", "127.0.0.1", ((8000, 8099),), "127.0.0.1:8000-8099"),
    ("8000-8000", "tcp", "127.0.0.1", ((8000, 8000),), "127.0.0.1:8000"),
    (
        "8000,8001,9000-9010,0",
        "tcp",
        "127.0.0.1",
        ((8000, 8000), (8001, 8001), (9000, 9010), (0, 0)),
        "127.0.0.1:8000,8001,9000-9010,0",
    ),
    ("127.0.0.1", "tcp", "127.0.0.1", ANY, "127.0.0.1:0"),
    ("127.0.0.1:8000", "tcp", "127.0.0.1", ((8000, 8000),), "127.0.0.1:8000"),
    ("127.0.0.1:8000-8002,0", "tcp", "127.0.0.1", ((8000, 8002), (0, 0)), "127.0.0.1:8000-8002,0"),
    ("localhost", "tcp", "127.0.0.1", ANY, "127.0.0.1:0"),
    ("localhost:8000", "tcp", "127.0.0.1", ((8000, 8000),), "127.0.0.1:8000"),
    ("0.0.0.0", "tcp", "0.0.0.0", ANY, "0.0.0.0:0"),
    ("0.0.0.0:80", "tcp", "0.0.0.0", ((80, 80),), "0.0.0.0:80"),
    ("*", "tcp", "*", ANY, "*:0"),
    ("*:8000,0", "tcp", "*", ((8000, 8000), (0, 0)), "*:8000,0"),
    ("[::1]", "tcp", "::1", ANY, "[::1]:0"),
    ("[::1]:8000", "tcp", "::1", ((8000, 8000),), "[::1]:8000"),
    ("[::]", "tcp", "::", ANY, "[::]:0"),
    ("[fe80::1%eth0]:8000", "tcp", "fe80::1%eth0", ((8000, 8000),), "[fe80::1%eth0]:8000"),
    ("host.example", "tcp", "host.example", ANY, "host.example:0"),
    ("my-host:8000", "tcp", "my-host", ((8000, 8000),), "my-host:8000"),
    ("4you", "tcp", "4you", ANY, "4you:0"),
    ("bücher.example", "tcp", "bücher.example", ANY, "bücher.example:0"),
    ("udp:0", "udp", "127.0.0.1", ANY, "udp:127.0.0.1:0"),
    ("udp:53,0", "udp", "127.0.0.1", ((53, 53), (0, 0)), "udp:127.0.0.1:53,0"),
    ("udp:127.0.0.1:53", "udp", "127.0.0.1", ((53, 53),), "udp:127.0.0.1:53"),
    ("udp:[::1]:53", "udp", "::1", ((53, 53),), "udp:[::1]:53"),
    ("udp:*:53", "udp", "*", ((53, 53),), "udp:*:53"),
    ("unix:/run/api.sock", "unix", "/run/api.sock", (), "unix:/run/api.sock"),
    ("unix:api.sock", "unix", "api.sock", (), "unix:api.sock"),
    ("unix:@api", "unix", "@api", (), "unix:@api"),
    ("unix:/run/a=b.sock", "unix", "/run/a=b.sock", (), "unix:/run/a=b.sock"),
    ("unix:/run/a:b,c [d]", "unix", "/run/a:b,c [d]", (), "unix:/run/a:b,c [d]"),
    ("unix:" + "x" * 107, "unix", "x" * 107, (), "unix:" + "x" * 107),
]


@pytest.mark.parametrize(("text", "kind", "address", "candidates", "full"), FORMS)
def test_form(text: str, kind: str, address: str, candidates: tuple[tuple[int, int], ...], full: str) -> None:
    (spec,) = parse_listen([text])
    assert spec == ListenSpec("listener1", kind, address, candidates, named=False)
    assert str(spec) == full


@pytest.mark.parametrize(("text", "kind", "address", "candidates", "full"), FORMS)
def test_form_with_a_name(text: str, kind: str, address: str, candidates: tuple[tuple[int, int], ...], full: str) -> None:
    (spec,) = parse_listen([f"web-1_A={text}"])
    assert spec == ListenSpec("web-1_A", kind, address, candidates, named=True)
    assert str(spec) == full


FORMS_HINT = "a spec is ADDRESS, ADDRESS:PORTS, PORTS, unix:PATH or udp:[ADDRESS:]PORTS; see portexec --help"
PORTS_HINT = "ports are numbers, ranges and lists: 8000 or 8000-8099 or 3000,0; or stable"
BRACKET_HINT = "an IPv6 address is written [::1]:PORTS"
PATH_HINT = "write unix:PATH, or unix:@NAME for an abstract one"
NAME_HINT = "names are up to 255 letters, digits, `-` and `_`"

MALFORMED = [
    ("", "malformed listen spec ''", FORMS_HINT),
    (" ", "malformed listen spec ' '", FORMS_HINT),
    (":8000", "malformed listen spec ':8000'", "write 8000 alone, or *:8000 for every address"),
    (":", "malformed listen spec ':'", FORMS_HINT),
    ("a b", "malformed listen spec 'a b'", FORMS_HINT),
    ("localhost,8000", "malformed listen spec 'localhost,8000'", FORMS_HINT),
    ("/run/api.sock", "malformed listen spec '/run/api.sock'", "a unix socket is written unix:/run/api.sock"),
    ("@api", "malformed listen spec '@api'", FORMS_HINT),
    ("api=", "malformed listen spec 'api='", FORMS_HINT),
    ("api=web=0", "malformed listen spec 'api=web=0'", FORMS_HINT),
    ("udp:", "malformed listen spec 'udp:'", FORMS_HINT),
    ("host\x1b[0m", "malformed listen spec 'host\\x1b[0m'", FORMS_HINT),
    (
        "8000:9000",
        "8000 is no address in listen spec '8000:9000'",
        "a range is 8000-9000; a command with a fixed port gets another by --remap 9000",
    ),
    ("::1", "malformed listen spec '::1'", "an IPv6 address goes in brackets: [::1]"),
    ("::1:3000", "malformed listen spec '::1:3000'", "an IPv6 address goes in brackets: [::1]:3000, or [::1:3000]"),
    ("[::1", "malformed listen spec '[::1'", BRACKET_HINT),
    ("[]", "malformed listen spec '[]'", BRACKET_HINT),
    ("[]:8000", "malformed listen spec '[]:8000'", BRACKET_HINT),
    ("[::1]8000", "malformed listen spec '[::1]8000'", BRACKET_HINT),
    ("127.0.0.1:", "malformed port '' in listen spec '127.0.0.1:'", PORTS_HINT),
    ("[::1]:", "malformed port '' in listen spec '[::1]:'", PORTS_HINT),
    ("8000,", "malformed port '' in listen spec '8000,'", PORTS_HINT),
    ("8000,,0", "malformed port '' in listen spec '8000,,0'", PORTS_HINT),
    ("8000-", "malformed port '' in listen spec '8000-'", PORTS_HINT),
    ("8000-8010-8020", "malformed port '8010-8020' in listen spec '8000-8010-8020'", PORTS_HINT),
    ("localhost:-1", "malformed port '' in listen spec 'localhost:-1'", PORTS_HINT),
    ("localhost:http", "malformed port 'http' in listen spec 'localhost:http'", PORTS_HINT),
    ("localhost:+80", "malformed port '+80' in listen spec 'localhost:+80'", PORTS_HINT),
    ("localhost:8_000", "malformed port '8_000' in listen spec 'localhost:8_000'", PORTS_HINT),
    ("localhost:\u0663", "malformed port '\u0663' in listen spec 'localhost:\u0663'", PORTS_HINT),
    ("3000, 0", "malformed port ' 0' in listen spec '3000, 0'", PORTS_HINT),
    ("65536", "port 65536 in '65536' is too high", "the highest is 65535"),
    ("localhost:99999999999999999999", "port 99999999999999999999 in 'localhost:99999999999999999999' is too high", None),
    ("8000-65536", "port 65536 in '8000-65536' is too high", "the highest is 65535"),
    ("8099-8000", "reversed port range 8099-8000 in '8099-8000'", "write 8000-8099"),
    ("0-5", "port range 0-5 begins at 0 in '0-5'", "0 alone is any free port; 1 is the lowest"),
    ("0-0", "port range 0-0 begins at 0 in '0-0'", "0 alone is any free port; 1 is the lowest"),
    ("=0", "empty listener name in '=0'", "write NAME=SPEC, or the spec alone"),
    ("my api=0", "bad listener name 'my api'", NAME_HINT),
    ("my.api=0", "bad listener name 'my.api'", NAME_HINT),
    ("büro=0", "bad listener name 'büro'", NAME_HINT),
    ("x" * 256 + "=0", f"bad listener name '{'x' * 256}'", NAME_HINT),
    ("unix:", "no path in listen spec 'unix:'", PATH_HINT),
    ("unix:@", "no path in listen spec 'unix:@'", PATH_HINT),
    ("api=unix:", "no path in listen spec 'api=unix:'", PATH_HINT),
    ("unix:a\0b", "a NUL character in listen spec 'unix:a\\x00b'", FORMS_HINT),
    (
        "unix:" + "ü" * 54,
        f"the path of 'unix:{'ü' * 54}' is 108 bytes long, and a unix socket takes at most 107",
        "use a shorter path, or one relative to the working directory",
    ),
]


@pytest.mark.parametrize(("text", "message", "hint"), MALFORMED)
def test_malformed(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(PortexecError) as caught:
        parse_listen([text])
    assert caught.value.message == message
    assert hint is None or caught.value.hint == hint
    assert caught.value.status == 125


def test_url_is_told_apart_from_an_ipv6_address() -> None:
    """What people copy from a browser gets a hint that helps."""
    with pytest.raises(PortexecError) as caught:
        parse_listen(["http://localhost:3000"])
    assert "IPv6" not in caught.value.hint


def test_brackets_are_for_ipv6() -> None:
    """Else `[udp]:5` would be a host that is written `udp:5`, which is something else."""
    with pytest.raises(PortexecError):
        parse_listen(["[udp]:5"])


def test_names_by_position() -> None:
    specs = parse_listen(["0", "api=0", "udp:0"])
    assert [(spec.name, spec.named) for spec in specs] == [("listener1", False), ("api", True), ("listener3", False)]


@pytest.mark.parametrize(
    ("texts", "message", "hint"),
    [
        (["a=0", "a=0"], "the listener name 'a' is used twice", "every listener has a name of its own"),
        (["listener2=0", "0"], "the listener name 'listener2' is used twice", "every listener has a name of its own"),
        (["a-b=0", "a_b=0"], "the names 'a-b' and 'a_b' would both be A_B_PORT", "rename one of them"),
        (["Api=0", "0", "api=0"], "the names 'Api' and 'api' would both be API_PORT", "rename one of them"),
    ],
)
def test_names_that_clash(texts: list[str], message: str, hint: str) -> None:
    with pytest.raises(PortexecError) as caught:
        parse_listen(texts)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_numbers_come_in_the_order_in_which_they_are_written() -> None:
    (spec,) = parse_listen(["9000-9002,8000,0"])
    assert list(spec.numbers()) == [9000, 9001, 9002, 8000, 0]


@pytest.mark.parametrize(
    ("name", "variable"),
    [("api", "API_PORT"), ("my-api", "MY_API_PORT"), ("a_B2", "A_B2_PORT"), ("listener1", "LISTENER1_PORT")],
)
def test_variable_of(name: str, variable: str) -> None:
    assert variable_of(name) == variable


@pytest.mark.parametrize("change", [{"name": "b"}, {"kind": "udp"}, {"address": "::1"}, {"candidates": ()}, {"named": False}])
def test_specs_differ_in_every_field(change: dict[str, object]) -> None:
    fields: dict[str, object] = {"name": "a", "kind": "tcp", "address": "*", "candidates": ANY, "named": True}
    spec = ListenSpec(**fields)  # type: ignore[arg-type]
    assert spec == ListenSpec(**fields)  # type: ignore[arg-type]
    assert spec != ListenSpec(**(fields | change))  # type: ignore[arg-type]
    assert spec != "*:0"


# How long an example takes is the machine's affair.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# What a command line can hold: any bytes but NUL.
arguments = st.binary(max_size=40).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
# Texts that come near to a spec.
pieces = st.sampled_from(
    [
        "",
        "0",
        "80",
        "-",
        ",",
        ":",
        "::",
        "[",
        "]",
        "[::1]",
        "*",
        "=",
        ".",
        "/",
        "@",
        "%",
        " ",
        "a",
        "udp:",
        "unix:",
        "localhost",
    ]
)
near_specs = st.lists(pieces, max_size=7).map("".join)
ports = st.integers(1, 65535)
ranges = st.one_of(st.just("0"), ports.map(str), st.tuples(ports, ports).map(lambda pair: f"{min(pair)}-{max(pair)}"))
addresses = st.sampled_from(["127.0.0.1", "0.0.0.0", "[::1]", "[::]", "*", "localhost", "host.example", "[fe80::1%lo]"])
valid_specs = st.tuples(st.sampled_from(["", "udp:"]), addresses, st.lists(ranges, min_size=1, max_size=5).map(",".join)).map(
    lambda parts: f"{parts[0]}{parts[1]}:{parts[2]}"
)


@unhurried
@given(st.lists(st.one_of(arguments, near_specs), max_size=4))
def test_any_texts_are_specs_or_a_portexec_error(texts: list[str]) -> None:
    try:
        specs = parse_listen(texts)
    except PortexecError:
        return
    assert len(specs) == len(texts)
    assert all(is_name(spec.name) for spec in specs)
    assert all(0 <= low <= high <= 65535 for spec in specs for low, high in spec.candidates)


@unhurried
@given(st.one_of(arguments, near_specs))
@example("[udp]:5")
@example("[unix]:5")
@example("unix:a=b")
def test_what_is_parsed_and_written_is_parsed_as_the_same(text: str) -> None:
    try:
        (spec,) = parse_listen([text])
    except PortexecError:
        return
    assert parse_listen([f"{spec.name}={spec}" if spec.named else str(spec)]) == [spec]


@unhurried
@given(valid_specs)
def test_every_combination_of_the_parts_is_a_spec(text: str) -> None:
    (spec,) = parse_listen([text])
    assert str(spec) == text.replace("localhost", "127.0.0.1") or "-" in text
    assert parse_listen([str(spec)]) == [spec]
