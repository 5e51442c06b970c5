"""JSON by the core of json: the same as the package, with any value and any text."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portexec import plainjson

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXTS = st.text() | st.text(alphabet='{}[]",:\\ \t\n0123456789.eE+-truefalsn\x00\ud800\ufeff')
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=10,
)


def outcome(read: Any, text: str | bytes) -> object:
    try:
        return repr(read(text))
    except (ValueError, RecursionError) as error:
        return type(error), str(error)


@unhurried
@given(VALUES)
def test_it_writes_what_the_package_writes_and_reads_it_again(value: Any) -> None:
    text = plainjson.dumps(value)
    assert text == json.dumps(value)
    assert plainjson.loads(text) == plainjson.loads(text.encode()) == json.loads(text)


@unhurried
@given(TEXTS)
def test_it_reads_or_refuses_what_the_package_does(text: str) -> None:
    assert outcome(plainjson.loads, text) == outcome(json.loads, text)
    data = text.encode(errors="surrogatepass")
    assert outcome(plainjson.loads, data) == outcome(json.loads, data)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "NaN", "[1, -Infinity]", b"\xff\xfe[\x001\x00]\x00", b"\xff", ""]
)
def test_odd_texts(text: str | bytes) -> None:
    assert type(outcome(plainjson.loads, text)) is type(outcome(json.loads, text))


def test_a_value_that_is_none() -> None:
    with pytest.raises(TypeError, match="set is no JSON"):
        plainjson.dumps({"a": set()})


def test_a_malformed_text_is_refused_before_anybody_has_imported_the_package() -> None:
    """The core then has no error to raise, before Python 3.12."""
    script = """
from portexec import plainjson
import sys
assert plainjson.loads('{"a": [1]}') == {"a": [1]}
assert "json" not in sys.modules
for text in ('{"a"', "[1] x", "", "nul", '"\\\\x"'):
    try:
        plainjson.loads(text)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("char") == 5
