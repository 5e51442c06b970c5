"""The pytest plugin, in a pytest of its own for every case: what its servers are, whom it blames, and what it leaves.

The plugin is not named on any command line here: an installed portexec brings it along.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from textwrap import dedent

import pytest

from portexec.api import pytest_entry
from tests.support import DEADLINE, ROOT, child, wait_for
from tests.support.installed import FEW_PLUGINS

pytest_plugins = ["pytester"]

TWICE = 2 * DEADLINE
NO_DEATH = "*Exited: the server ended by itself*"

# Every test file begins with this. `note` leaves a line about a server, `say` one of any kind, for us to read afterwards.
PROLOGUE = f"""
import os, signal, time, unittest, urllib.request
import portexec, pytest

LIGHT = {child("light")!r}

def say(text):
    with open({{place!r}}, "a") as file:
        file.write(f"{{{{text}}}}\\n")

def note(server):
    say(f"{{{{server.pid}}}} {{{{server.port}}}}")
    return server

def ask(server, path="/"):
    with urllib.request.urlopen(server.url + path, timeout={DEADLINE}) as response:
        return response.read().decode()

def kill_and_see(server):
    os.kill(server.pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{{{{server.pid}}}}/exe"):
        time.sleep(0.001)
"""


class Inner:
    """A pytest to be run on test files of ours."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self._notes = pytester.path / "notes"

    def write(self, source: str, name: str = "test_it.py") -> None:
        (self.pytester.path / name).write_text(PROLOGUE.format(place=str(self._notes)) + dedent(source))

    def run(self, source: str, *options: str) -> pytest.RunResult:
        self.write(source)
        return self.pytester.runpytest_subprocess("-p", "no:cacheprovider", "--tb=short", *options, timeout=TWICE)

    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    def pids(self) -> list[int]:
        return [int(line.split()[0]) for line in self.notes()]

    def is_nothing_left(self) -> bool:
        left = [pid for pid in self.pids() if os.path.exists(f"/proc/{pid}")]
        assert not left, f"left running: {left}"
        return True


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    """With nothing of the pytest that runs us in its environment."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_ADDOPTS", FEW_PLUGINS)
    return Inner(pytester)


# What the fixtures give.


def test_each_test_has_servers_of_its_own(inner: Inner) -> None:
    done = inner.run(
        """
        def test_two(portexec_server):
            one, other = note(portexec_server(LIGHT)), note(portexec_server(LIGHT, env={"WHO": "other"}))
            assert ask(one) == f"hello from {one.pid}"
            assert ask(other, "/variable/WHO") == "other"

        def test_one_more(portexec_server):
            for line in open("notes"):
                assert not os.path.exists(f"/proc/{line.split()[0]}"), "stopped at the end of the other test"
            server = note(portexec_server(LIGHT))
            assert ask(server) == f"hello from {server.pid}"
        """
    )
    done.assert_outcomes(passed=2)
    assert len(set(inner.pids())) == 3
    assert len({line.split()[1] for line in inner.notes()[:2]}) == 2
    assert inner.is_nothing_left()


def test_the_session_shares_one(inner: Inner) -> None:
    inner.write("def test_elsewhere(site): note(site); assert ask(site)", "test_another.py")
    inner.write(
        """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return portexec_session_server(LIGHT)
        """,
        "conftest.py",
    )
    done = inner.run(
        """
        def test_first(site): note(site); assert ask(site)
        def test_second(site): note(site); assert ask(site)
        """
    )
    done.assert_outcomes(passed=3)
    assert len(inner.pids()) == 3
    assert len(set(inner.pids())) == 1
    assert inner.is_nothing_left()


@pytest.mark.parametrize("scope", ["function", "class", "module", "session"])
def test_a_server_ends_with_the_fixture_that_started_it(inner: Inner, scope: str) -> None:
    """So that the one of another parameter is stopped before, and can have had the same number."""
    done = inner.run(
        f"""
        class Test:
            @pytest.fixture(scope={scope!r}, params=["a", "b"])
            def site(self, request, portexec_session_server):
                if os.path.exists("notes"):
                    for line in open("notes"):
                        assert not os.path.exists(f"/proc/{{line.split()[0]}}")
                yield note(portexec_session_server(LIGHT, env={{"WHO": request.param}}))
                say("0 end")

            def test_it(self, site, request):
                assert ask(site, "/variable/WHO") == request.node.callspec.params["site"]

        def test_bad(): assert 0
        """
    )
    done.assert_outcomes(passed=2, failed=1)
    assert len(set(inner.pids())) == 3
    assert [line == "0 end" for line in inner.notes()] == [False, True, False, True]
    done.stdout.no_fnmatch_line("*portexec: http*")
    assert inner.is_nothing_left()


def test_a_failure_shows_nothing_of_the_server_of_another_parameter(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture(scope="module", params=["a", "b"])
        def site(request, portexec_session_server):
            return portexec_session_server(["sh", "-c", f"echo of {request.param}; exec " + " ".join(LIGHT)])

        def test_it(site, request):
            assert "[b]" not in request.node.name
        """
    )
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*portexec: http*", "of b"])
    done.stdout.no_fnmatch_line("of a")


def test_a_server_of_the_session_that_a_test_starts_stays(inner: Inner) -> None:
    done = inner.run(
        """
        SITES = []

        def test_starts(portexec_session_server):
            SITES.append(portexec_session_server(LIGHT))

        def test_uses():
            assert ask(SITES[0])
        """
    )
    done.assert_outcomes(passed=2)


def test_a_server_that_does_not_start_is_an_error_with_its_output(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture
        def site(portexec_server):
            return portexec_server(["sh", "-c", "echo no database; exit 3"])

        def test_site(site): pass
        def test_word(portexec_server): portexec_server("npm start")
        """
    )
    done.assert_outcomes(errors=1, failed=1)
    done.stdout.fnmatch_lines(["*Exited: the command ended before it was ready: exit status 3", "*no database"])
    done.stdout.fnmatch_lines(["*CommandNotAList: command='npm start' is no list", "*hint: write a list*"])


# What a failure shows.


def test_a_failure_shows_what_the_servers_wrote(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return portexec_session_server(["sh", "-c", "echo of the session; exec " + " ".join(LIGHT)])

        def test_good(portexec_server):
            ask(portexec_server(["sh", "-c", "echo of a good test; exec " + " ".join(LIGHT)]))

        def test_bad(site, portexec_server):
            server = note(portexec_server(["sh", "-c", "echo of a bad test; exec " + " ".join(LIGHT)]))
            assert ask(server, "/status/200") == "201"
        """
    )
    done.assert_outcomes(passed=1, failed=1)
    [noted] = inner.notes()
    pid, port = noted.split()
    done.stdout.fnmatch_lines(["*AssertionError*", f"*portexec: http://127.0.0.1:{port} (*, pid {pid}) *", "of a bad test"])
    done.stdout.fnmatch_lines(["*portexec: http*", "of the session"])
    done.stdout.no_fnmatch_line("of a good test")
    done.stdout.no_fnmatch_line(NO_DEATH)


def test_what_comes_after_the_failure_is_shown_too(inner: Inner) -> None:
    done = inner.run(
        """
        def test_bad(portexec_server):
            words = "trap 'echo last words; kill -9 $!; exit' TERM; " + " ".join(LIGHT) + " ignore & wait"
            assert ask(portexec_server(["sh", "-c", words])) == "good bye"
        """
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*portexec: http*", "serving *", "*portexec: http*) teardown*", "last words"])


def test_no_output_makes_no_section(inner: Inner) -> None:
    done = inner.run(
        """
        def test_bad(portexec_server):
            portexec_server(["sh", "-c", "exec " + " ".join(LIGHT) + " >/dev/null"])
            assert 0
        """
    )
    done.assert_outcomes(failed=1)
    done.stdout.no_fnmatch_line("*portexec: http*")


CHATTY = """
@pytest.fixture(scope="session")
def site(portexec_server_any_scope):
    site = portexec_server_any_scope(LIGHT)
    ask(site, "/write/100000")
    return site

def test_first(site): pass

@pytest.mark.parametrize("number", range(3))
def test_bad(site, number):
    ask(site, "/write/200")
    assert 0

def test_loud(site):
    ask(site, "/write/100000")
    assert 0
"""


def test_only_what_was_written_since_the_test_began_is_shown(inner: Inner) -> None:
    """In whole lines; where much was written, the last of it, and a mark."""
    done = inner.run(CHATTY, "-k", "not loud")
    done.assert_outcomes(passed=1, failed=3, deselected=1)
    assert sum("Captured stdout of portexec" in line for line in done.outlines) == 3
    assert sum(line == "x" * 99 for line in done.outlines) == 6
    done.stdout.no_fnmatch_line("*left out*")
    done = inner.run(CHATTY, "-k", "loud")
    done.stdout.fnmatch_lines(["* call -", "[[]portexec: * bytes left out[]]", "x" * 99, "written"])
    assert 100 < sum(line == "x" * 99 for line in done.outlines) < 400
    assert not [line for line in done.outlines if line.startswith("x") and line != "x" * 99]


def test_sections_are_those_of_captured_output(inner: Inner) -> None:
    file = inner.pytester.path / "junit.xml"
    source = """
        def test_bad(portexec_server):
            ask(portexec_server(["sh", "-c", "echo a line; exec " + " ".join(LIGHT)]), "/status/500")
    """
    done = inner.run(source, "--show-capture=no", f"--junitxml={file}", "-o", "junit_logging=system-out")
    done.assert_outcomes(failed=1)
    done.stdout.no_fnmatch_line("a line")
    assert file.read_text().count("a line\n") == 1
    done = inner.run(source, "--show-capture=stdout")
    done.stdout.fnmatch_lines(["*Captured stdout of portexec*", "a line"])


def test_output_that_is_not_captured_is_seen_live(inner: Inner) -> None:
    source = """
        def test_bad(portexec_server, capfd):
            site = portexec_server(["sh", "-c", "echo a line; exec " + " ".join(LIGHT)])
            assert ask(site)
            assert site.output.startswith("a line")
            assert "a line" not in capfd.readouterr().out, "it is the terminal's"
            assert 0
    """
    done = inner.run(source, "-s")
    done.assert_outcomes(failed=1)
    assert sum(line.endswith("a line") for line in done.outlines) == 1
    done.stdout.no_fnmatch_line("*Captured stdout of portexec*")


def test_a_start_that_is_ended_from_outside_shows_its_output(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture(autouse=True)
        def alarm():
            def end(*_):
                pytest.fail("Timeout")
            usual = signal.signal(signal.SIGALRM, end)
            yield
            signal.signal(signal.SIGALRM, usual)

        def test_it(portexec_server):
            portexec_server(["sh", "-c", f"echo loading; kill -ALRM {os.getpid()}; exec sleep 1000"])
        """
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*Failed: Timeout", "*Captured stdout of portexec: http*", "loading"])


@pytest.mark.parametrize("place", ["conftest.py", "test_it.py"])
def test_the_plugin_may_be_loaded_late(inner: Inner, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS")
    line = 'pytest_plugins = ["portexec.api.pytest_plugin"]\n'
    source = dedent(DIES.format(path="/exit/3"))
    if place == "conftest.py":
        inner.write(line, place)
    done = inner.run(source if place == "conftest.py" else line + source)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["E *portexec.server_errors.Exited: the server ended by itself: exit status 3; *"])


# A server that died is the failure.

DIES = """
def test_it(portexec_server):
    ask(portexec_server(LIGHT), {path!r})
"""


@pytest.mark.parametrize(
    ("path", "how"),
    [("/exit/3", "exit status 3"), ("/exit/0", "exit status 0"), ("/kill/9", "killed by SIGKILL")],
    ids=["exit", "success", "kill"],
)
def test_a_death_is_the_failure_and_the_clients_error_its_cause(inner: Inner, path: str, how: str) -> None:
    done = inner.run(DIES.format(path=path))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*RemoteDisconnected: Remote end closed connection without response",
            "The above exception was the direct cause of the following exception:",
            f"E *portexec.server_errors.Exited: the server ended by itself: {how}; it was http://*",
            "*portexec: http*, returncode *) call *",
            "serving *",
            "FAILED test_it.py::test_it - portexec.server_errors.Exited:*",
        ]
    )


def test_the_last_words_of_the_dead_are_complete(inner: Inner) -> None:
    done = inner.run(DIES.format(path="/burst/10000"))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*the server ended by itself: exit status 7; it was *", "written"])
    assert sum(line == "x" * 99 for line in done.outlines) == 100


DYING = {
    "in a fixture": """
        @pytest.fixture
        def site(portexec_server):
            site = portexec_server(LIGHT)
            ask(site, "/exit/3")
            return site

        def test_it(site): pass
        """,
    "after yield": """
        @pytest.fixture
        def site(portexec_server):
            yield (site := portexec_server(LIGHT))
            ask(site, "/exit/3")

        def test_it(site): pass
        """,
    "in a TestCase": """
        class Test(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def _start(self, portexec_server):
                self.site = portexec_server(LIGHT)

            def test_it(self):
                ask(self.site, "/exit/3")
        """,
    "with pytest.fail": """
        def test_it(portexec_server):
            try:
                ask(portexec_server(LIGHT), "/exit/3")
            except OSError:
                pytest.fail("it does not answer")
        """,
    "with a wrong answer": """
        def test_it(portexec_server):
            site = portexec_server(LIGHT)
            with pytest.raises(OSError):
                ask(site, "/exit/3")
            assert site.url == ""
        """,
    "unnoticed": """
        def test_it(portexec_server):
            site = portexec_server(LIGHT)
            ask(site)  # so it has said that it serves
            kill_and_see(site)
        """,
    "below the command": """
        import portexec.api.pytest_plugin

        def test_it(portexec_server):
            portexec.api.pytest_plugin._PATIENCE = 60  # for the shell, which may be slow
            ask(portexec_server(["sh", "-c", " ".join(LIGHT) + "; exit 4"]), "/exit/3")
        """,
    "of the session": """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return portexec_session_server(LIGHT)

        def test_it(site):
            ask(site, "/exit/3")
        """,
    "asked for by name": """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return portexec_session_server(LIGHT)

        def test_it(request):
            ask(request.getfixturevalue("site"), "/exit/3")
        """,
    "from the factory": """
        def test_it(portexec_session_server):
            ask(portexec_session_server(LIGHT), "/exit/3")
        """,
}


@pytest.mark.parametrize("source", DYING.values(), ids=DYING)
def test_a_death_is_the_failure_wherever_it_shows(inner: Inner, source: str) -> None:
    done = inner.run(source)
    outcomes = done.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) + outcomes.get("error", 0) == 1
    ended = "E *portexec.server_errors.Exited: the server ended by itself: *; it was http://*, returncode *)"
    done.stdout.fnmatch_lines([ended, "*Captured stdout of portexec: http*", "serving *"])
    assert sum("Exited: the server ended" in line and line.startswith("E ") for line in done.outlines) == 1


def test_a_death_in_a_doctest_comes_with_the_line_that_failed(inner: Inner) -> None:
    (inner.pytester.path / "page.txt").write_text(
        f"""
        >>> import portexec, urllib.request
        >>> with portexec.serve({child("light")!r}) as server:
        ...     urllib.request.urlopen(server.url + "/exit/3")
        """
    )
    done = inner.pytester.runpytest_subprocess("-p", "no:cacheprovider", "page.txt", timeout=TWICE)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["00? *>>> with portexec.serve*", "*page.txt:3: UnexpectedException", "E *Exited: the server ended*"]
    )


def test_a_death_that_another_failure_was_expected_for_is_not_hidden(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.mark.xfail(raises=OSError)
        def test_it(portexec_server):
            ask(portexec_server(LIGHT), "/exit/3")
        """
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["FAILED test_it.py::test_it - portexec.server_errors.Exited: *"])


def test_a_death_at_the_very_end_is_told_every_time(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.mark.parametrize("_", range(20))
        def test_it(portexec_server, _):
            os.kill(portexec_server(LIGHT).pid, signal.SIGKILL)
        """
    )
    outcomes = done.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) + outcomes.get("error", 0) == 20
    done.stdout.fnmatch_lines(["E *ended by itself: killed by SIGKILL; *", "E * hint: a test that expects its server to end *"])


def test_a_factory_that_is_kept_for_another_test(inner: Inner) -> None:
    """It was the later tests that failed, by an assertion of pytest's."""
    done = inner.run(
        """
        kept = []

        def test_one(portexec_server):
            kept.append(portexec_server)

        def test_other():
            with pytest.raises(portexec.UsageError, match="the fixture portexec_server is over"):
                kept[0](LIGHT)

        def test_good(portexec_server):
            pass
        """
    )
    done.assert_outcomes(passed=3)


def test_a_server_that_ended_with_0_comes_with_a_hint(inner: Inner) -> None:
    done = inner.run(DIES.format(path="/exit/0"))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["E *ended by itself: exit status 0; *", "E * hint: a test that expects its server to end calls *"]
    )


# Every server of the process is known, however it was started.

PLAIN = {
    "in a fixture": """
        @pytest.fixture(scope="module")
        def site():
            with portexec.serve(LIGHT) as site:
                yield site

        def test_it(site):
            ask(site, "/exit/3")
        """,
    "in setUpClass": """
        class Test(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                cls.site = cls.enterClassContext(portexec.serve(LIGHT)) if hasattr(cls, "enterClassContext") else START()

            def test_it(self):
                ask(self.site, "/exit/3")
        """,
    "in setup_method": """
        class Test:
            def setup_method(self):
                self.site = START()

            def test_it(self):
                ask(self.site, "/exit/3")
        """,
    "in the test": """
        def test_it():
            with portexec.serve(LIGHT) as site:
                ask(site, "/exit/3")
        """,
    "in an async test": """
        @pytest.mark.anyio
        async def test_it(anyio_backend):
            async with portexec.serve(LIGHT) as site:
                ask(site, "/exit/3")
        """,
    "in an async fixture": """
        @pytest.fixture
        async def site(anyio_backend):
            async with portexec.serve(LIGHT) as site:
                yield site

        @pytest.mark.anyio
        async def test_it(site):
            ask(site, "/exit/3")
        """,
    "from the async factory": """
        @pytest.mark.anyio
        async def test_it(anyio_backend, portexec_async_server):
            ask(await portexec_async_server(LIGHT), "/exit/3")
        """,
    "in an async fixture of the module": """
        @pytest.fixture(scope="module")
        def anyio_backend():
            return "trio"

        @pytest.fixture(scope="module")
        async def site(anyio_backend, portexec_async_server_any_scope):
            return await portexec_async_server_any_scope(LIGHT)

        @pytest.mark.anyio
        async def test_it(site):
            ask(site, "/exit/3")
        """,
}
START = """
SERVINGS = []

def START():
    SERVINGS.append(portexec.serve(LIGHT))
    return SERVINGS[-1].__enter__()

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


@pytest.mark.parametrize("source", PLAIN.values(), ids=PLAIN)
def test_every_server_of_the_process_is_known(inner: Inner, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:timeout")
    done = inner.run(START + dedent(source))
    outcomes = done.parseoutcomes()
    assert outcomes == {"failed": 1}
    done.stdout.fnmatch_lines(["E *portexec.server_errors.Exited: the server ended by itself: exit status 3; *"])
    done.stdout.fnmatch_lines(["*Captured stdout of portexec: http*", "serving *"])
    assert not [line for line in done.outlines if "portexec/api/" in line], "frames of ours"


def test_a_server_of_nobody_is_no_failure_of_a_good_test(inner: Inner) -> None:
    """One of a test that is over, and one that was started by the import of a module."""
    done = inner.run(
        """
        SITES = [portexec.serve(LIGHT).__enter__()]

        def test_starts():
            SITES.append(portexec.serve(LIGHT).__enter__())

        @pytest.mark.parametrize("number", [0, 1])
        def test_good(number):
            kill_and_see(SITES[number])

        def test_bad():
            site = portexec.serve(LIGHT).__enter__()
            SITES.append(site)

        def test_fails_of_it():
            ask(SITES[-1], "/exit/3")
        """
    )
    done.assert_outcomes(passed=4, failed=1)
    done.stdout.fnmatch_lines(["E *portexec.server_errors.Exited: the server ended by itself: exit status 3; *"])


def test_a_fixture_of_the_same_name_in_another_file_is_another(inner: Inner) -> None:
    inner.write(
        """
        SITES = []

        @pytest.fixture(scope="session")
        def site(portexec_server_any_scope):
            return portexec_server_any_scope(LIGHT)

        def test_a(site):
            SITES.append(site)
        """,
        "test_a.py",
    )
    inner.write(
        """
        import test_a

        @pytest.fixture
        def site(portexec_server):
            return portexec_server(LIGHT)

        def test_good(site):
            kill_and_see(test_a.SITES[0])
            ask(site)

        def test_bad(site):
            ask(site)  # so it has said that it serves
            assert site.port == 0
        """,
        "test_b.py",
    )
    done = inner.run("")
    done.assert_outcomes(passed=2, failed=1)
    assert sum("Captured stdout of portexec" in line for line in done.outlines) == 1
    done.stdout.no_fnmatch_line(NO_DEATH)


def test_a_fixture_that_overrides_another_may_use_it(inner: Inner) -> None:
    inner.write(
        """
        @pytest.fixture(scope="session")
        def site(portexec_server_any_scope):
            return portexec_server_any_scope(LIGHT)

        @pytest.fixture(scope="session")
        def unused(portexec_server_any_scope):
            return portexec_server_any_scope(LIGHT)

        @pytest.fixture(scope="session")
        def by_name(request):
            return request.getfixturevalue("site")
        """,
        "conftest.py",
    )
    inner.write("def test_first(site, unused): say(unused.pid)", "test_a.py")
    inner.write(
        """
        @pytest.fixture
        def site(site):
            return site

        @pytest.fixture
        def unused():
            return int(open("notes").read())

        def test_b(site, unused):
            os.kill(unused, signal.SIGKILL)
            while os.path.exists(f"/proc/{unused}/exe"):
                time.sleep(0.001)

        def test_c(site):
            ask(site, "/exit/3")
        """,
        "test_b.py",
    )
    done = inner.run("")
    done.assert_outcomes(passed=2, failed=1)
    done.stdout.fnmatch_lines(["E *portexec.server_errors.Exited: the server ended by itself: exit status 3; *"])


# Nobody is blamed who is not to blame.


def test_what_the_test_says_itself_stands(inner: Inner) -> None:
    done = inner.run(
        """
        def test_skips(portexec_server):
            kill_and_see(portexec_server(LIGHT))
            pytest.skip("not here")

        @pytest.mark.xfail
        def test_fails_as_expected(portexec_server):
            ask(portexec_server(LIGHT), "/kill/9")

        @pytest.mark.xfail
        def test_fails_of_a_death_as_expected(portexec_server):
            kill_and_see(portexec_server(LIGHT))

        @pytest.mark.xfail(raises=portexec.Exited)
        def test_fails_of_nothing_but_a_death(portexec_server):
            ask(portexec_server(LIGHT), "/exit/3")

        def test_expects_the_end(portexec_server):
            site = portexec_server(LIGHT)
            with pytest.raises(OSError):
                ask(site, "/exit/3")
            assert site.wait() == 3

        def test_looks_for_the_death(portexec_server):
            site = portexec_server(LIGHT)
            kill_and_see(site)
            assert site.died(60).returncode == -9

        def test_expects_that_it_does_not_start():
            with pytest.raises(portexec.Exited), portexec.serve(["false"]):
                pass

        def test_stops_it(portexec_server):
            site = portexec_server(LIGHT)
            site.stop()
            with pytest.raises(OSError):
                ask(site)

        def test_raises_while_it_lives(portexec_server):
            site = portexec_server(LIGHT)
            raise OSError("something else")
        """
    )
    done.assert_outcomes(skipped=1, xfailed=3, passed=4, failed=1)
    done.stdout.fnmatch_lines(["E *OSError: something else"])
    done.stdout.no_fnmatch_line(NO_DEATH)


def test_a_death_is_told_of_the_test_that_saw_it_and_of_those_that_fail_of_it(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return portexec_session_server(LIGHT)

        def test_before(site): ask(site)
        def test_kills(site): ask(site, "/kill/9")
        def test_after(site): ask(site)
        def test_needs_none(): pass
        def test_does_not_ask(site): pass
        def test_own(portexec_server): ask(portexec_server(LIGHT))
        """
    )
    done.assert_outcomes(passed=4, failed=2)
    done.stdout.fnmatch_lines(
        [
            "FAILED test_it.py::test_kills - portexec.server_errors.Exited: *",
            "FAILED test_it.py::test_after - portexec.server_errors.Exited: *",
        ]
    )
    done.stdout.no_fnmatch_line("*Captured stdout of portexec*")  # it wrote nothing since these tests began


def test_a_death_is_not_told_of_tests_that_use_another_server(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture(scope="session")
        def api(portexec_session_server):
            return portexec_session_server(LIGHT)

        @pytest.fixture(scope="session")
        def database(portexec_session_server):
            return portexec_session_server(LIGHT)

        PID = []

        def test_both(api, database):
            PID.append(database.pid)

        def test_api(api):
            os.kill(PID[0], signal.SIGKILL)
            while os.path.exists(f"/proc/{PID[0]}"):
                time.sleep(0.001)
            ask(api)

        def test_database(database):
            with pytest.raises(OSError):
                ask(database)
        """
    )
    done.assert_outcomes(passed=3)


# With pytest-xdist, and at the end.


def test_every_worker_has_its_own(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return portexec_session_server(LIGHT)

        @pytest.mark.parametrize("number", range(8))
        def test_site(site, number):
            say(f"{site.pid} {os.environ['PYTEST_XDIST_WORKER']}")
            assert ask(site) == f"hello from {site.pid}"

        def test_bad(site):
            ask(site, "/kill/9")
        """,
        "-n2",
        "--dist=each",
    )
    done.assert_outcomes(passed=16, failed=2)
    assert len(set(inner.notes())) == len(set(inner.pids())) == 2
    done.stdout.fnmatch_lines(["E *Exited: the server ended by itself: killed by SIGKILL; it was http*"])
    assert inner.is_nothing_left()


def test_many_workers_with_a_server_for_each_test_and_one_worker_killed() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "bench_pytest.py"), "--tests", "40", "--workers", "8", *child("light")]
    environment = os.environ | {"PYTEST_ADDOPTS": FEW_PLUGINS}
    done = subprocess.run(words, capture_output=True, text=True, timeout=4 * DEADLINE, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_nothing_is_left_when_pytest_is(inner: Inner, number: signal.Signals) -> None:
    inner.write(
        """
        @pytest.fixture(scope="session")
        def site(portexec_session_server):
            return note(portexec_session_server(LIGHT))

        def test_site(site, portexec_server):
            server = note(portexec_server(["sh", "-c", " ".join(LIGHT) + " & wait"]))
            say(ask(server).split()[-1])
            say(os.getpid())
            signal.pause()
        """
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    with subprocess.Popen(words, cwd=inner.pytester.path, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: len(inner.notes()) == 4)
            process.send_signal(number)
            process.wait(DEADLINE)
        finally:
            process.kill()
    assert process.returncode in (-signal.SIGKILL, pytest.ExitCode.INTERRUPTED)
    assert wait_for(inner.is_nothing_left)


# What it costs.


def test_it_costs_nothing_where_it_is_not_used(inner: Inner) -> None:
    inner.write(
        """
        import sys

        def pytest_unconfigure(config):
            say(config.pluginmanager.get_plugin("portexec").__name__)
            for name in sorted(sys.modules):
                if name.startswith("portexec") or name in ("anyio", "dotenv"):
                    say(name)
        """,
        "conftest.py",
    )
    # anyio has a pytest plugin itself, which is there wherever anyio is, but for FEW_PLUGINS.
    inner.run("def test_nothing(): pass").assert_outcomes(passed=1)
    entry, plugin = "portexec.api.pytest_entry", "portexec.api.pytest_plugin"
    known, watchers = "portexec.api.known_servers", "portexec.api.watchers"
    assert inner.notes() == [entry, "portexec", "portexec.api", known, entry, plugin, watchers]


@pytest.mark.parametrize(("version", "plugins"), [((7, 4, 4), []), ((8, 0, 0), ["portexec.api.pytest_plugin"])])
def test_an_older_pytest_gets_nothing(version: tuple[int, ...], plugins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "version_tuple", version)
    assert runpy.run_path(pytest_entry.__file__)["pytest_plugins"] == plugins


def test_it_is_not_seen_where_it_is_not_used(inner: Inner) -> None:
    done = inner.run(
        """
        @pytest.fixture
        def broken(): raise OSError("broken")

        def test_error(broken): pass
        def test_failure(): raise OSError("broken")
        """
    )
    done.assert_outcomes(errors=1, failed=1)
    lines = [line.replace(str(inner.pytester.path), "") for line in done.outlines]  # of a user who may be called anything
    assert sum("portexec" in line for line in lines) == 1, "in the list of plugins"


def test_the_fixtures_are_in_the_list(inner: Inner) -> None:
    done = inner.run("", "--fixtures")
    done.stdout.fnmatch_lines_random(
        [
            "portexec_server -- *",
            "portexec_session_server [[]session scope[]] -- *",
            "    A function that starts a server for this test: *",
        ]
    )
