"""What `import portexec` costs and shows."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import portexec
from tests.support import DEADLINE
from tests.support.serving import (
    PACKAGE_HOME,
    run_caller,
)


def test_importing_it_costs_next_to_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", "import portexec; portexec.__version__; dir(portexec)"],
        env={"PYTHONPATH": PACKAGE_HOME},
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "portexec" in imported
    before = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", ""], env={}, stderr=subprocess.PIPE, text=True, timeout=DEADLINE
    )
    usual = {line.rpartition("|")[2].strip() for line in before.stderr.splitlines() if line.startswith("import time:")}
    assert imported - usual == {"portexec", "__future__"}


def test_serve_and_listen_import_nothing_of_the_loop() -> None:
    code = "import sys, portexec; portexec.serve(['true']); portexec.listen().close(); print(*sys.modules)"
    assert not {"anyio", "asyncio", "trio"} & set(run_caller(code).split())


def test_all_is_what_can_be_had() -> None:
    assert sorted(portexec.__all__) == portexec.__all__
    for name in portexec.__all__:
        assert getattr(portexec, name) is not None
    names: dict[str, object] = {}
    exec("from portexec import *", names)
    assert set(names) - {"__builtins__"} == set(portexec.__all__)
    assert dir(portexec) == portexec.__all__
    with pytest.raises(AttributeError, match="nothing_like_that"):
        portexec.nothing_like_that  # type: ignore[attr-defined]  # noqa: B018  # the access is the test


def test_every_public_thing_says_what_it_is() -> None:
    for name in portexec.__all__:
        thing = getattr(portexec, name)
        if isinstance(thing, str):
            continue
        assert thing.__doc__, name
        for member, value in vars(thing).items() if isinstance(thing, type) else ():
            if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{member}"


def test_every_error_is_one_of_ours() -> None:
    public = [getattr(portexec, name) for name in portexec.__all__]
    kinds = [thing for thing in public if isinstance(thing, type) and issubclass(thing, BaseException)]
    assert len(kinds) >= 10
    assert all(issubclass(kind, portexec.PortexecError) for kind in kinds)


@pytest.mark.parametrize(
    ("factory", "gives"), [(portexec.ServerFactory, "Server"), (portexec.AsyncServerFactory, "AsyncServer")]
)
def test_the_factories_take_what_serve_takes(factory: type, gives: str) -> None:
    ours, its = (inspect.signature(function) for function in (portexec.serve, factory.__call__))
    assert list(its.parameters.values())[1:] == list(ours.parameters.values())
    assert its.return_annotation == gives
