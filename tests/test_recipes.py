"""docs/recipes.md, run: each recipe with the real tool, in a folder of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support import ANNOUNCED, DEADLINE, ROOT, Running, get, run, wait_for
from tests.support.hosts import hosts
from tests.support.installed import APPS, lack, need, needs_ipv6
from tests.support.recipes import Recipe, sections, written

pytestmark = [pytest.mark.once, pytest.mark.recipes]

PAGE = "recipes.md"
TRIED = ROOT / "scripts" / "try_recipes.py"
# postgres and others refuse root: a user of a namespace of our own, to whom root's files belong
AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
# With patience for a machine that is busy.
BROWSER = {
    "executablePath": "/usr/bin/chromium",
    "args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
    "timeout": int(3000 * DEADLINE),
}


class Open(Protocol):
    def __call__(self, heading: str, folder: str = "") -> Recipe: ...


def test_every_recipe_is_run() -> None:
    assert headings_in(Path(__file__), "recipe") | headings_in(TRIED, "Recipe") >= set(sections(PAGE))


def headings_in(file: Path, function: str) -> set[str]:
    """The headings with which a file calls this function."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    taking = [call for call in calls if getattr(call.func, "id", "") == function]
    return {
        word.value for call in taking for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Open]:
    """Opens a recipe of the page; all of its lines have to be run."""
    opened: list[Recipe] = []

    def open_recipe(heading: str, folder: str = "") -> Recipe:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        opened.append(Recipe(PAGE, heading, place))
        return opened[-1]

    yield open_recipe
    for one in opened:
        one.end()
    assert [one.left for one in opened if one.left] == []


# Browsers


def add_browser(one: Recipe) -> None:
    """Debian's Chromium for the recipe's suite, with Playwright where `npm install` would put it."""
    need(["node", "npx", "chromium"])
    modules = Path(subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True).stdout.strip())
    if not (modules / "@playwright" / "test" / "cli.js").exists():
        lack("@playwright/test")
    programs = one.folder / "node_modules" / ".bin"
    programs.mkdir(parents=True)
    (programs.parent / "@playwright").symlink_to(modules / "@playwright")
    (programs / "playwright").symlink_to("../@playwright/test/cli.js")
    one.environment["NPM_CONFIG_OFFLINE"] = "true"


def add_suite(one: Recipe) -> None:
    """A suite of one check, which says whose page it saw.

    The recipe's configuration gets the browser of this machine, and patience for one that is busy.
    """
    add_browser(one)
    config = one.folder / "playwright.config.js"
    config.rename(one.folder / "recipe.config.js")
    config.write_text(f"""
        import recipe from './recipe.config.js'
        const timeout = {int(3000 * DEADLINE)}
        const webServer = recipe.webServer && {{ ...recipe.webServer, timeout }}
        const use = {{ ...recipe.use, launchOptions: {json.dumps(BROWSER)} }}
        export default {{ ...recipe, timeout, webServer, use }}
    """)
    (one.folder / "hello.spec.js").write_text("""
        import { expect, test } from '@playwright/test'
        test('hello', async ({ page }) => {
          await page.goto('/')
          const text = await page.textContent('body')
          expect(text).toContain('hello from')
          console.log(`saw: ${text} at ${page.url()}`)
        })
    """)


def seen(output: str) -> list[str]:
    return re.findall("saw: (.*)", output)


def test_playwright(recipe: Open) -> None:
    """Two projects at once: each suite sees its own server."""
    one, other = (recipe("Playwright's webServer", name) for name in ("one", "other"))
    for each in (one, other):
        add_suite(each)
    with one.started(one.take("npx")) as first, other.started(other.take("npx")) as second:
        outputs = [process.communicate(timeout=4 * DEADLINE)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert [len(seen(output)) for output in outputs] == [1, 1]
    assert seen(outputs[0]) != seen(outputs[1])


def test_playwright_with_a_server_that_stays(recipe: Open) -> None:
    one = recipe("Playwright with a server that stays")
    add_suite(one)
    output = one.run("npx")
    first, second = seen(output)
    assert first == second
    assert output.endswith("portexec: web has ended\n")


WATCH = """
import { chromium } from '@playwright/test'
import { writeFileSync } from 'node:fs'

const browser = await chromium.launch(%s)
const page = await browser.newPage()
await page.goto(process.argv[2])
await page.getByText('first').waitFor()
await page.evaluate(() => { window.isSame = true })
// A change is lost when the websocket is not open yet, or when Vite has not looked at the file. Then it is changed anew.
const second = page.getByText('second')
for (let count = 0; count < 60 && !(await second.isVisible()); count++) {
  writeFileSync('text.js', `export const text = 'second' // ${count}\\n`)
  await second.waitFor({ timeout: 1000 }).catch(() => {})
}
await second.waitFor()
console.log(`isSame ${await page.evaluate(() => window.isSame)}`)
await browser.close()
"""


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("[::1]", marks=needs_ipv6)])
def test_vite(host: str, recipe: Open) -> None:
    """A module is replaced in the page that is open: no reload, so it came by the websocket."""
    one = recipe("Vite and its websocket")
    need(["vite"])
    add_browser(one)
    (one.folder / "package.json").write_text('{"type": "module"}')
    (one.folder / "index.html").write_text('<p></p><script type="module" src="/main.js"></script>')
    (one.folder / "text.js").write_text("export const text = 'first'\n")
    (one.folder / "main.js").write_text("""
        import { text } from './text.js'
        const show = (text) => { document.querySelector('p').textContent = text }
        show(text)
        import.meta.hot.accept('./text.js', (module) => show(module.text))
    """)
    (one.folder / "watch.mjs").write_text(WATCH % json.dumps(BROWSER))
    plain, v6 = one.left
    one.left = [v6 if host == "[::1]" else plain]
    line = one.take().replace("portexec", "portexec --then 'node watch.mjs {url} && echo at {url}'")
    done = one.end_of(line)
    assert done.returncode == 0, done.stdout
    assert "isSame true" in done.stdout
    where = re.findall("^at http://(.*):", done.stdout, re.MULTILINE)[0]
    assert host in (where, "127.0.0.1")  # without an address, `localhost` is what /etc/hosts says


def test_variables(recipe: Open) -> None:
    one = recipe("Variables of test runners")
    need(["npm", "node"])
    assert re.search(r"^http://127\.0\.0\.1:\d+$", one.run("portexec"), re.MULTILINE)


# Task runners


def test_package_json(recipe: Open) -> None:
    one = recipe("package.json")
    need(["npm", "node", "curl"])
    (one.folder / "package.json").write_text(one.files["package.json"])
    assert "hello from" in one.run("npm test")
    with one.started("exec npm run dev") as process:
        url = written(process, ANNOUNCED.pattern)[2]
        assert "hello from" in wait_for(lambda: get(url))


def check_of(one: Recipe, beginning: str, *needed: str) -> None:
    """The tool runs the recipe's tests, which ask the server of this run."""
    need(["curl", *needed])
    (one.folder / "index.html").write_text(f"hello from {one.folder}")
    assert f"hello from {one.folder}" in one.run(beginning)


def test_tox(recipe: Open) -> None:
    one = recipe("tox")
    check_of(one, "tox", "tox")


def test_nox(recipe: Open) -> None:
    one = recipe("nox")
    check_of(one, "nox", "nox")


def test_hatch(recipe: Open) -> None:
    one = recipe("hatch")
    check_of(one, "hatch", "hatch")


def test_just(recipe: Open) -> None:
    one = recipe("just")
    check_of(one, "just", "just")


def test_make(recipe: Open) -> None:
    one = recipe("make")
    check_of(one, "make", "make")


def test_pre_commit(recipe: Open) -> None:
    one = recipe("pre-commit")
    need(["git"])
    subprocess.run(["git", "init", "-q"], cwd=one.folder, check=True)
    subprocess.run(["git", "add", ".pre-commit-config.yaml"], cwd=one.folder, check=True)
    check_of(one, "pre-commit", "pre-commit")


def test_restart_when_a_file_changes(recipe: Open) -> None:
    """Requests come all the time, each on a connection of its own; none is refused or lost.

    The server drains. One that does not may lose what it has not read when its machine gives it no time for a second.
    """
    one = recipe("Restart when a file changes")
    need(["entr", "node"])
    app = Path(shutil.copy(APPS / "drains.js", one.folder / "server.js"))
    before = app.read_text()

    def change_to(word: str) -> bool:
        """Write the file, which nobody sees empty. entr sees no change before it looks, nor one while its command runs."""
        with app.open("r+") as file:
            file.write(before.replace("hello", word))
        return asked.hears(word)

    with one.started(one.take()) as process:
        url = written(process, ANNOUNCED.pattern)[2]
        asked = Asking(url)
        try:
            assert wait_for(lambda: "hello" in asked.answer)
            for word in ("salut", "servus"):
                assert wait_for(lambda word=word: change_to(word))  # type: ignore[misc]
        finally:
            asked.stop()
    assert asked.count > 0
    assert asked.failures == []


class Asking:
    """A client that asks again and again. `answer` is the last one; `failures` are the requests without one."""

    def __init__(self, url: str) -> None:
        self.answer = ""
        self.count = 0
        self.failures: list[str] = []
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._is_over.wait(0.005):
            try:
                self.answer = get(self._url)
                self.count += 1
            except OSError as error:
                self.failures.append(str(error))

    def hears(self, word: str) -> bool:
        """Whether an answer with this word comes within a second."""
        end = time.monotonic() + 1
        while word not in self.answer and time.monotonic() < end:
            time.sleep(0.01)
        return word in self.answer

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def test_several_servers(recipe: Open) -> None:
    one = recipe("Several servers before the tests")
    need(["honcho", "node", "uvicorn", "fastapi", "curl"])
    assert len(set(re.findall(r"hello from \d+", one.run("portexec")))) == 2


# Where servers run


@pytest.mark.root
def test_entrypoint(recipe: Open, tmp_path: Path) -> None:
    """As process 1 of a PID namespace, in a network of its own where the number is free: HUP replaces, TERM ends."""
    one = recipe("A container's ENTRYPOINT")
    need(["unshare", "gunicorn", "curl"])
    dockerfile = one.files["Dockerfile"]
    words = json.loads(dockerfile.partition("ENTRYPOINT ")[2])
    words[1:1] = ["--kill-after", f"{DEADLINE}s"]  # the status is 0 only if gunicorn ends by itself
    with hosts(one.folder, "box") as (box,):
        process = subprocess.Popen(
            [*box, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *words],
            env=one.environment,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        server = Running(process)
        try:
            server.line("portexec: http://127.0.0.1:8000")
            first = wait_for(lambda: ask(box))
            # Of another length: a file of the same length, written within the same second, is the same one for Python's cache.
            (one.folder / "wsgi.py").write_text((one.folder / "wsgi.py").read_text().replace("hello", "good day"))
            inside = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            assert Path(f"/proc/{inside}/comm").read_text() == "portexec\n"
            os.kill(inside, signal.SIGHUP)
            assert first.startswith("hello from ")
            assert wait_for(lambda: ask(box).startswith("good day"))
            os.kill(inside, signal.SIGTERM)
            assert process.wait(2 * DEADLINE) == 0
        finally:
            server.stop()


def ask(box: list[str]) -> str:
    return subprocess.run([*box, "curl", "-s", "http://10.77.0.1:8000/"], capture_output=True, text=True).stdout


def test_vs_code(recipe: Open) -> None:
    one = recipe("VS Code")
    need(["npm", "node"])
    (task,) = json.loads(one.files[".vscode/tasks.json"])["tasks"]
    matcher = task["problemMatcher"]["background"]
    with one.started(f"exec {task['command']}") as process:
        written(process, matcher["beginsPattern"])
        ready = written(process, matcher["endsPattern"]).string
        assert get(json.loads(ready)["listeners"][0]["url"]).startswith("hello from")
    error = run("-l", "x y", "--", "true").stderr.splitlines()[0]
    assert re.search(task["problemMatcher"]["pattern"]["regexp"], error)


def test_systemd(recipe: Open) -> None:
    """The unit's own words, with a socket as systemd hands it over."""
    one = recipe("systemd")
    need(["systemd-socket-activate", "gunicorn", "curl"])
    service, runtime = one.files["web.service"], one.folder / "run"
    runtime.mkdir()
    found = re.search("^ExecStart=(.*)$", service, re.MULTILINE)
    assert found
    words = found[1].replace("/usr/local/bin/", f"{one.folder}/.bin/").replace("/srv/web", ".")
    words = words.replace("/run/web", str(runtime))
    listen = re.sub("^.*ListenStream=/run/", str(runtime) + "/", one.files["web.socket"], flags=re.DOTALL).strip()
    line = f"exec systemd-socket-activate -E PATH -l {listen} {words}"
    with one.started(line):
        client = f"curl -s --unix-socket {listen} http://web/"
        assert wait_for(lambda: "hello from" in one.end_of(client).stdout)
        port = (runtime / "metrics.port").read_text().strip()
        assert get(f"http://127.0.0.1:{port}/").startswith("hello from")
    for name, text in one.files.items():
        (one.folder / name).write_text(text.replace("/usr/local/bin/portexec", "/bin/true"))
    if os.geteuid() == 0:
        files = [str(one.folder / name) for name in one.files]
        checked = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_coverage(recipe: Open) -> None:
    one = recipe("Coverage of the server")
    need(["coverage", "uvicorn", "fastapi"])
    one.environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    report = one.run("coverage run")
    assert re.search(r"^app\.py .* 100%$", report, re.MULTILINE), report


# Databases and other servers


def need_database(one: Recipe, *names: str) -> None:
    """These programs; Debian keeps those of PostgreSQL where no PATH looks."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    one.find_first(*places)
    one.environment["PATH"] += f"{os.pathsep}/usr/sbin"
    missing = [name for name in names if not shutil.which(name, path=one.environment["PATH"])]
    if missing:
        lack(*missing)


def test_postgres(recipe: Open) -> None:
    one = recipe("PostgreSQL")
    need_database(one, "initdb", "postgres", "psql")
    one.environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    one.environment["PYTEST_ADDOPTS"] = "-p portexec.api.pytest_plugin -p no:cacheprovider"
    assert "1 passed" in one.run("python", on=AS_USER)


def test_mariadb(recipe: Open) -> None:
    one = recipe("MariaDB")
    need_database(one, "mariadbd", "mariadb", "mariadb-install-db")
    assert "42" in one.run("mariadb", on=AS_USER)


def test_redis_and_memcached(recipe: Open) -> None:
    one = recipe("Redis and memcached")
    need(["redis-server", "redis-cli", "memcached", "curl"])
    assert "PONG" in one.run("portexec")
    assert "VERSION 1." in one.run("portexec")


def test_grpc(recipe: Open) -> None:
    one = recipe("gRPC")
    if subprocess.run(["/usr/bin/python3", "-c", "import grpc"], capture_output=True).returncode:
        lack("python3-grpcio")
    one.find_first("/usr/bin")
    assert "hello you" in one.run("portexec --ready accept")


def test_second_numbers(recipe: Open) -> None:
    one = recipe("Servers that derive a second number")
    need(["redis-server", "redis-cli"])
    assert "cluster_my_epoch" in one.run("portexec")


def test_shared_daemon(recipe: Open) -> None:
    one = recipe("A daemon that several runs share")
    need(["erl", "epmd"])
    output = one.run("portexec --detach")
    assert "\npong\n" in output
    assert "portexec: epmd has ended\n" in output
