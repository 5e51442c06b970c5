"""The entry point that pytest loads where portexec is installed: the plugin, or nothing where pytest is too old for it."""

from __future__ import annotations

import pytest

# An old pytest loads this, too, and has to go on as if portexec were not installed.
pytest_plugins = ["portexec.api.pytest_plugin"] if getattr(pytest, "version_tuple", (0,)) >= (8,) else []
