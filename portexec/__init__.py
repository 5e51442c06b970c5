"""portexec binds a free port first and then runs your command with it, so that nobody can take the port in between."""

__version__ = "0.1.0"
