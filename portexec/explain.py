"""What a launch is going to do, in words for `--dry-run` and `-v` and as JSON. Pure."""

from __future__ import annotations

from portexec.command import activation
from portexec.command.publish import described
from portexec.errors import escaped
from portexec.launch import Launch


def verbose(launch: Launch) -> list[str]:
    """The lines that `-v` adds: the hand-off and the reason for it, and what is guarded."""
    lines = [f"hand-off {launch.choice.hand_off}: {launch.choice.why}"]
    return lines + [f"guarding port {port} on every address" for port in launch.bound.guards]


def plan_text(launch: Launch) -> str:
    """The plan, for a person. Control characters are spelled out, whatever the words and variables have in them."""
    plan = launch.plan
    rows = [("hand-off", f"{launch.choice.hand_off} ({launch.choice.why})")]
    for listener in described(launch.bound.listeners, launch.first_fd):
        descriptor = f"  descriptor {listener['fd']}" if "fd" in listener else ""
        rows.append(("listener", f"{listener['name']}  {listener['url']}{descriptor}"))
    rows += [("guard", f"port {port}, every address") for port in launch.bound.guards]
    rows += [("set", f"{name}={value}") for name, value in _additions(launch).items()]
    if plan.for_pid:
        rows.append(("set", "LISTEN_PID, to the command's pid"))
    rows.append(("run", " ".join(_quoted(word) for word in [plan.file, *plan.argv[1:]])))
    rows.append(("note", "the next run binds anew: a port of 0 becomes another number"))
    return "".join(f"{name:<10}{escaped(text)}\n" for name, text in rows)


def plan_json(launch: Launch) -> str:
    """The plan, for a program: one JSON line."""
    import json

    return (
        json.dumps(
            {
                "hand_off": launch.choice.hand_off,
                "why": launch.choice.why,
                "listeners": described(launch.bound.listeners, launch.first_fd),
                "guards": sorted(launch.bound.guards),
                "environment": _additions(launch),
                "file": launch.plan.file,
                "argv": launch.plan.argv,
            }
        )
        + "\n"
    )


def _additions(launch: Launch) -> dict[str, str]:
    """The variables that portexec itself sets. Those of env files and -e are the user's, and may be secret."""
    shown = {*launch.variables, *activation.VARIABLES}
    return {name: value for name, value in launch.plan.environment.items() if name in shown}


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
