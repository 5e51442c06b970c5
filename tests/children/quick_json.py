"""The two functions of `json` that these programs need, without that module's regular expressions: `quick_json as json`."""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner


class Ways:
    """How the scanner reads what it meets."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float, parse_int, parse_constant = float, int, float
    memo: dict[str, str] = {}  # noqa: RUF012


_scan = make_scanner(Ways)  # type: ignore[arg-type]
_encode = make_encoder(None, None, encode_basestring_ascii, None, ": ", ", ", False, False, True)  # type: ignore[arg-type]


def loads(text: str | bytes):
    """The value of a text that begins with it."""
    return _scan(text if isinstance(text, str) else text.decode(), 0)[0]


def dumps(value: object) -> str:
    return "".join(_encode(value, 0))
