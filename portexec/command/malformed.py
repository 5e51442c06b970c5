"""What is wrong with a line of an env file that the parser has refused, and what to write instead. Pure.

No part of the line is repeated: it may be a secret.
"""

from __future__ import annotations

import re

_QUOTED = {quote: re.compile(rf"{quote}(?:\\.|[^{quote}\\])*{quote}", re.DOTALL) for quote in "'\""}


def fault(text: str) -> tuple[int, str, str]:
    """Where in the text the fault is, what it is, and a hint. The text may begin with empty lines, and include later ones."""
    if "\0" in text:
        return text.index("\0"), "it has a NUL byte", "is it UTF-16? save the file as UTF-8 text"
    start = len(text) - len(text.lstrip())
    return start, *_fault_of_line(text.strip())


def _fault_of_line(line: str) -> tuple[str, str]:
    if line == "export":
        return "export has no name", "write export NAME=VALUE"
    first, *rest = line.split(None, 1)
    name, equals, value = (rest[0] if first == "export" else line).partition("=")
    if not equals:
        return "it has no =", "write NAME=VALUE; a comment begins with #"
    if not name.strip():
        return "there is no name before the =", "write NAME=VALUE; a comment begins with #"
    if len(name.split()) > 1 and not name.startswith("'"):
        return "there is a space in the name", "write NAME=VALUE; only export may stand before it"
    value = value.lstrip()
    if value[:1] in _QUOTED:
        return _fault_of_quotes(value, value[0])
    return "it is no NAME=VALUE", "write NAME=VALUE, with quotes around a value that has spaces"


def _fault_of_quotes(value: str, quote: str) -> tuple[str, str]:
    within = rf"with \{quote} for a quote within"
    closed = _QUOTED[quote].match(value)
    if closed is None:
        return f"the quote {quote} is not closed", f"write NAME={quote}VALUE{quote}, {within}"
    if "\n" in closed[0]:
        return f"the quote {quote} is closed in a later line, with text after it", f"close it where the value ends, {within}"
    return "there is text after the closing quote", f"put all of the value between the quotes, {within}"
