"""The watchers: the newest one is told of each server of this process when its start begins, in the thread that starts it.

The pytest plugin is a watcher. It imports only this module for that, so that a test suite without servers pays nothing. A
watcher is given the server's `Driver`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Watcher = Callable[[Any], object]

_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """Tell this watcher from now on, instead of earlier ones: a pytest that runs inside a test has servers of its own."""
    _watchers.append(watcher)


def unwatch(watcher: Watcher) -> None:
    """Tell this watcher no more."""
    _watchers.remove(watcher)


def tell(driver: object) -> None:
    """Tell the newest watcher of a server."""
    if _watchers:
        _watchers[-1](driver)
