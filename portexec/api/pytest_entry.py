"""What an installed portexec is to pytest: the plugin, or nothing for a pytest that the plugin was not made for."""

from __future__ import annotations

import pytest

# Every pytest loads this wherever portexec is installed, and has to go on as if it were not.
pytest_plugins = ["portexec.api.pytest_plugin"] if getattr(pytest, "version_tuple", (0,)) >= (8,) else []
