#!/usr/bin/env bash
# Runs what the README and docs/ show with tools that are too large for continuous integration: Docker, RabbitMQ, torchrun,
# Selenium, concurrently; and of the README's table FastAPI's command, Vite, Next.js, Rails and Spring Boot.
#
#     try_recipes.sh [PYTEST OPTION]...      such as -k docker
#
# What is not installed is skipped, and said. Needs root for Docker and torchrun, which run in network namespaces of their own.
# Debian: docker.io busybox-static, rabbitmq-server, chromium-driver. PyPI: torch, selenium, whose Python is $TRY_PYTHON. npm,
# global: concurrently. The rows of the table need a project of their kind, in the folders fastapi, vite, next, rails and spring of
# $TRY_PROJECTS; fastapi is on the PATH. The versions of what is there are printed first.
set -euo pipefail
cd "$(dirname "$0")/.."

version() { printf '%-12s %s\n' "$1" "$("${@:2}" 2>/dev/null | head -n 1 || echo 'not installed')"; }

export TRY_PYTHON=${TRY_PYTHON:-python3}
version docker dockerd --version
version rabbitmq dpkg-query --show --showformat '${Version}' rabbitmq-server
version chromedriver chromedriver --version
version selenium "$TRY_PYTHON" -c 'import selenium; print(selenium.__version__)'
version torch "$TRY_PYTHON" -c 'import torch; print(torch.__version__)'
version concurrently npx --no-install concurrently --version
exec "${PYTHON:-.venv/bin/python}" -m pytest -q -rs scripts/try_recipes.py "$@"
