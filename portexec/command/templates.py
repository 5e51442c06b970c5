"""Templates: `{port}`, `{api.url}` and their like, in the words of the command and in `-e`. Pure.

Literal replacement of known tokens and nothing else: all other braces stay, as JSON, awk and shells (`${port}`) need them.
`{{port}}` is the same as `{port}`, for task runners that eat single braces. What a replacement inserts is not looked at again.
"""

from __future__ import annotations

from portexec.binding.spec import is_name
from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FIELDS = ("port", "host", "url", "fd")


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace every token; `values` has them by what stands between the braces: `port`, `api.fd`.

    Raises UsageError for a token that is known in form but has no value.
    """
    parts = []
    done = 0
    for start, end, token in _tokens(text):
        if token not in values:
            raise _no_value(token, values)
        parts += [text[done:start], values[token]]
        done = end
    parts.append(text[done:])
    return "".join(parts)


def uses(text: str, field: str) -> bool:
    """Whether a token with this field, of whatever listener, stands in the text."""
    return any(token.rpartition(".")[2] == field for _, _, token in _tokens(text))


def _tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and inner text of every token, from left to right."""
    start = text.find("{")
    while start >= 0:
        is_shells = text.startswith("$", max(start - 1, 0)) and start > 0
        opening = 2 if text.startswith("{{", start) else 1
        end = text.find("}", start)
        token = text[start + opening : end] if end >= 0 else ""
        closing = 2 if text.startswith("}}", end) else 1
        if _is_token(token) and closing >= opening and not is_shells:
            yield start, end + opening, token
            start = text.find("{", end + opening)
        else:
            start = text.find("{", start + 1)


def _is_token(token: str) -> bool:
    name, dot, field = token.rpartition(".")
    return field in FIELDS and (is_name(name) if dot else not name)


def _no_value(token: str, values: Mapping[str, str]) -> UsageError:
    name, _, field = token.rpartition(".")
    names = sorted({known.rpartition(".")[0] for known in values} - {""})
    if name and name not in names:
        return UsageError(f"{{{token}}} names no listener of this run", f"the listeners are: {', '.join(names)}")
    if field == "fd":
        return UsageError(
            f"{{{token}}} is only known with hand-off fd", "leave --hand-off out, or say --hand-off fd, or use {port}"
        )
    return UsageError(
        f"{{{token}}}: a unix socket has no {field}", f"use {{{token.removesuffix(field)}url}}, which is unix:PATH"
    )
