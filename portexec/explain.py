"""What a launch is going to do, in words for `--dry-run` and `-v`, and as JSON."""

from __future__ import annotations

from portexec.binding.guard import WEAKLY, Guard
from portexec.command import activation
from portexec.command.plan import FD, misplaced
from portexec.command.publish import described
from portexec.errors import escaped
from portexec.launch import Launch
from portexec.request import NO

_WILDCARDS = {"0.0.0.0": "every IPv4 address", "::": "every IPv6 address", "*": "every IPv4 and IPv6 address"}


def verbose(launch: Launch) -> list[str]:
    """The lines that `-v` adds: the hand-off and the reason for it, and the guarded numbers."""
    lines = [f"hand-off {launch.choice.hand_off}: {launch.choice.why}"]
    return lines + [f"guarding port {port} {_extent(guard)}" for port, guard in launch.bound.guards.items()]


def plan_text(launch: Launch) -> str:
    """The plan, for a person. Control characters are spelled out, whatever the words and variables have in them."""
    plan = launch.plan
    rows = [("hand-off", f"{launch.choice.hand_off} ({launch.choice.why})")]
    for listener in described(launch.bound.listeners, launch.first_fd):
        descriptor = f"  descriptor {listener['fd']}" if "fd" in listener else ""
        rows.append(("listener", f"{listener['name']}  {listener['url']}{descriptor}"))
    rows += [("opens", text) for text in _opened(launch)]
    rows += [("guard", f"port {port}, {_extent(guard)}") for port, guard in launch.bound.guards.items()]
    rows += [("set", f"{name}={value}") for name, value in _additions(launch).items()]
    rows += [("set", f"{', '.join(names)}, from {source}") for source, names in _users_own(launch).items() if names]
    if plan.for_pid:
        rows.append(("set", "LISTEN_PID, to the command's pid"))
    rows.append(("run", " ".join(_quoted(word) for word in [plan.file, *plan.argv[1:]])))
    rows += [("remap", f"port {fixed} becomes {port}") for fixed, port in launch.remap.items()]
    rows += _file_rows(launch)
    rows += _name_rows(launch)
    rows += _lifetime_rows(launch)
    rows += [("note", text) for text in (launch.hidden_number(), misplaced(plan.argv)) if text]
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
                "opens": _opened(launch),
                "remap": launch.remap,
                "port_file": launch.request.chosen.port_file,
                "export": launch.request.chosen.export,
                "name": launch.request.name or None,
                "project": _project(launch) or None,
                "detach": launch.request.chosen.detach,
                "lifetime": _lifetime(launch),
            }
        )
        + "\n"
    )


def _opened(launch: Launch) -> list[str]:
    """What a wildcard address opens, for each listener that has one."""
    wildcards = [
        (listener.name, address)
        for spec, listener in zip(launch.request.specs, launch.bound.listeners, strict=True)
        if (address := _WILDCARDS.get(spec.address))
    ]
    if launch.choice.hand_off != FD:
        return [f"{name}: what the command binds; {launch.choice.hand_off} only keeps the number" for name, _ in wildcards]
    return [f"{name}: {address} of this machine, so that other machines can connect" for name, address in wildcards]


def _project(launch: Launch) -> str:
    """The project that the name belongs to; empty for a run without a name. Raises PortexecError."""
    from portexec import project

    return project.directory(launch.request.chosen.project, launch.request.given) if launch.request.name else ""


def _file_rows(launch: Launch) -> list[tuple[str, str]]:
    chosen = launch.request.chosen
    rows = [("write", f"{chosen.port_file}, the first listener's number")] if chosen.port_file is not None else []
    return rows + ([("append", f"{chosen.export}, the numbers")] if chosen.export is not None else [])


def _name_rows(launch: Launch) -> list[tuple[str, str]]:
    request = launch.request
    rows = [("name", f"{request.name}, of the project {_project(launch)}")] if request.name else []
    rows += [("detach", "goes to the background when ready, and prints the address")] if request.chosen.detach else []
    return rows + ([("reuse", "if the same runs already, takes that")] if request.chosen.reuse else [])


def _lifetime(launch: Launch) -> dict[str, str | float | bool | None]:
    """The values of the options under Lifetime, with their defaults; empty where no such option makes portexec stay."""
    lifetime = launch.request.lifetime
    if not lifetime.is_asked_for_with(launch.choice.hand_off):
        return {}
    ready = lifetime.ready_for(launch.choice.hand_off)
    return {
        "ready": f"{ready.form}:{ready.argument}" if ready.argument else ready.form,
        "ready_timeout": lifetime.ready_timeout,
        "then": launch.plan_shell(lifetime.then, launch.bound.listeners).argv[-1] if lifetime.then else None,
        "ready_fd": lifetime.ready_fd,
        "control_fd": lifetime.control_fd,
        "restart": lifetime.restart,
        "lazy": lifetime.is_lazy,
        "log": lifetime.log,
        "kill_after": lifetime.kill_after,
    }


def _lifetime_rows(launch: Launch) -> list[tuple[str, str]]:
    planned = _lifetime(launch)
    if not planned:
        return []
    within = "" if planned["ready_timeout"] is None else f", within {planned['ready_timeout']:g} s"
    rows = [("ready", f"{planned['ready']}{within}")]
    rows += [("then", f"sh -c {_quoted(str(planned['then']))}")] if planned["then"] else []
    rows += [("tell", f"descriptor {planned['ready_fd']}, when ready")] if planned["ready_fd"] is not None else []
    rows += [("driven", f"over descriptor {planned['control_fd']}")] if planned["control_fd"] is not None else []
    rows += [("restart", str(planned["restart"]))] if planned["restart"] != NO else []
    rows += [("lazy", "starts at the first connection")] if planned["lazy"] else []
    rows += [("log", f"{planned['log']}, stdout and stderr")] if planned["log"] else []
    return [*rows, ("stop", f"TERM, and KILL {planned['kill_after']:g} s later, to all that it has started")]


def _extent(guard: Guard) -> str:
    return WEAKLY if guard.is_open else "on every address"


def _additions(launch: Launch) -> dict[str, str]:
    """The variables that portexec itself sets. Those of env files and -e are the user's, and may be secret."""
    shown = {*launch.variables, *activation.VARIABLES}
    return {name: value for name, value in launch.plan.environment.items() if name in shown}


def _users_own(launch: Launch) -> dict[str, list[str]]:
    """The names of the variables that the user sets, by the place where they are set."""
    extra = launch.request.extra
    hidden = {*extra, *launch.request.given, *launch.variables}  # an env file does not change these
    return {"env files": [name for name in launch.from_files if name not in hidden], "-e": list(extra)}


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
