"""What the README and docs/ show with tools that continuous integration does not install. Run by scripts/try_recipes.sh, which
says how.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import DEADLINE, wait_for  # noqa: E402  # of this checkout
from tests.support.hosts import hosts  # noqa: E402
from tests.support.recipes import Recipe, lines_of_the_readme, written  # noqa: E402

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def need(*programs: str) -> None:
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def use_python_with(module: str, recipe: Recipe) -> None:
    """Have `python3`, and what is installed beside it, be the one that has this module."""
    python = shutil.which(os.environ.get("TRY_PYTHON", "python3"))
    if not python or subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"not installed: {module}")
    recipe.find_first(Path(python).parent)


def test_selenium(tmp_path: Path) -> None:
    need("chromedriver", "chromium", "npm")
    recipe = Recipe("recipes.md", "Selenium", tmp_path)
    use_python_with("selenium", recipe)
    output = recipe.run()
    assert "hello from" in output
    assert "driver has ended" in output


def test_concurrently(tmp_path: Path) -> None:
    need("npx", "curl")
    recipe = Recipe("recipes.md", "Several servers with concurrently", tmp_path)
    if subprocess.run(["npx", "--no-install", "concurrently", "--version"], capture_output=True).returncode:
        pytest.skip("not installed: concurrently")
    assert len(set(re.findall(r"hello from \d+", recipe.run()))) == 2


def test_rabbitmq(tmp_path: Path) -> None:
    programs = Path("/usr/lib/rabbitmq/bin")  # those on the PATH become the user rabbitmq
    need(str(programs / "rabbitmq-server"), "epmd")
    recipe = Recipe("recipes.md", "RabbitMQ", tmp_path)
    recipe.find_first(programs)
    recipe.environment |= {
        "RABBITMQ_NODENAME": "one@localhost",
        "RABBITMQ_MNESIA_BASE": str(tmp_path / "mnesia"),
        "RABBITMQ_LOG_BASE": str(tmp_path / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(tmp_path / "plugins"),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
    }
    output = recipe.run()
    announced = dict(re.findall(r"portexec: (\w+) http://127\.0\.0\.1:(\d+)", output))
    assert set(announced) == {"amqp", "dist"}
    for number in announced.values():
        assert re.search(rf"\b{number}\b", output.partition("[{listener,")[2])


# Rows of "Which line is mine" in the README: what each needs, and the folder of $TRY_PROJECTS that has a project of this kind.
ROWS = {
    "FastAPI's command": ("fastapi", "fastapi"),
    "Vite": ("npx", "vite"),
    "Next.js": ("npx", "next"),
    "Rails": ("bundle", "rails"),
    "Spring Boot": ("java", "spring"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_line_of_the_readme(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, folder = ROWS[name]
    place = Path(os.environ.get("TRY_PROJECTS", ".")).absolute() / folder
    if not place.is_dir():
        pytest.skip(f"no project {place}")
    need(program)
    monkeypatch.chdir(place)
    answer_of(lines_of_the_readme()[name])


def answer_of(line: str, on: Sequence[str] = (), **environment: str) -> str:
    """What the server of this line answers."""
    words = [sys.executable, "-m", "portexec", "-q", "--log", "/dev/null", "--then", "curl -sfg {url}"]
    words += shlex.split(line.removeprefix("portexec "))
    where = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([*on, *words], env=where, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def docker(box: list[str], folder: Path) -> Iterator[str]:
    """A daemon of our own in a network namespace, with an image `web`, which is called `nginx`, too; where its socket is."""
    need("docker", "dockerd", "busybox")
    host = f"unix://{folder}/docker.sock"
    places = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/run", "--pidfile", f"{folder}/docker.pid"]
    with (folder / "log").open("w") as log, ExitStack() as stack:
        daemon = subprocess.Popen([*box, "dockerd", "--host", host, *places], stdout=log, stderr=log)
        stack.callback(daemon.wait, DEADLINE)
        stack.callback(daemon.terminate)
        asked = ["docker", "--host", host, "info"]
        wait_for(lambda: subprocess.run(asked, capture_output=True).returncode == 0)
        image = folder / "image"
        (image / "bin").mkdir(parents=True)
        (image / "index.html").write_text("hello from a container")
        shutil.copy(shutil.which("busybox") or "", image / "bin")
        start = 'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/"]'
        packed = subprocess.run(["tar", "-C", str(image), "-c", "."], capture_output=True, check=True).stdout
        for name in ("web", "nginx"):
            subprocess.run(["docker", "--host", host, "import", "-c", start, "-", name], input=packed, check=True)
        yield host


@root_only
def test_docker(tmp_path: Path) -> None:
    recipe = Recipe("recipes.md", "docker run", tmp_path)
    with hosts(tmp_path, "node1") as (box,), docker(box, tmp_path) as host:
        recipe.environment["DOCKER_HOST"] = host
        assert "hello from a container" in recipe.run(on=box)
        assert recipe.end_of("docker ps -q", on=box).stdout == ""
        assert answer_of(lines_of_the_readme()["Docker"], on=box, DOCKER_HOST=host) == "hello from a container"


@root_only
def test_torchrun(tmp_path: Path) -> None:
    recipe = Recipe("several-machines.md", "torchrun's rendezvous", tmp_path)
    use_python_with("torch", recipe)
    recipe.environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with hosts(tmp_path, "node1", "node2") as (first, second), recipe.started(recipe.take(), on=first) as leader:
        written(leader, "portexec: http://node1:")
        assert "has 3.0" in recipe.run(on=second)
        written(leader, "has 3.0")
        assert leader.wait(DEADLINE) == 0
