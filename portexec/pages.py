"""The pages of `-h` and `--help`, made from the table of options. Pure."""

from __future__ import annotations

from portexec.options import GROUPS, LIFETIME, USAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.options import Option

# What `--help` and the manual say beside the options. Indented lines stay as they are.
PURPOSE = "Bind a free port first, then run COMMAND with it: nobody can take the port."
EXAMPLES = """\
  portexec -- uvicorn app:app --fd 3        serve on an inherited socket
  portexec -- npm start                     serve on $PORT
  portexec -l 3000,0 -- vite --port {port}  3000 if it is free, else any port
  portexec --then 'npm test' -- npm start   test the server, stop it, end as the
                                            tests did
"""
SPECS = """\
SPEC is ADDRESS, ADDRESS:PORTS, PORTS, unix:PATH, unix:@ABSTRACT or
udp:[ADDRESS:]PORTS, where
  ADDRESS  127.0.0.1  [::1]  localhost  0.0.0.0  [::]  * (both)  a host name
  PORTS    0 (any)  8000  8000-8099  stable (the project's own number)
           3000,0   candidates, tried in this order
"""
SEEN = """\
The command sees $PORT, and $API_PORT for a listener named api. In its words and
in -e, {port} {host} {url} {fd} stand for the first listener, {api.port} ...
for api.
"""
HAND_OFF = """\
Hand-offs: fd gives the command listening sockets, at descriptor 3 and following
and as LISTEN_FDS. With guard the command binds the number itself, and no other
program can. With hold the command binds it, too, but so could another program
that names it and sets SO_REUSEADDR. auto is fd when the command names the
descriptor ({fd}, --fd 3, fd://3), else guard, else hold.
"""
STAYING = f"""\
Any option under {LIFETIME}, and --name, makes portexec stay as the parent, and
stop what the command leaves behind. With --restart and fd, HUP to portexec
starts the command anew beside the old one, which is stopped when the new one is
ready.
"""
EXIT_STATUS = """\
Exit status: the command's own, or that of --then; 124 if it was not ready in
time, 125 if portexec itself failed, 126 if the command cannot be executed, 127
if it was not found.
"""

_HEAD = f"Usage: {USAGE}\n{PURPOSE}\n\n{EXAMPLES}"
_WIDTH = 80
_HELP_COLUMN = 31


def help_text() -> str:
    """The page that `--help` shows."""
    groups = (f"\n{title}\n" + "".join(map(_help_of, group)) for title, group in GROUPS)
    return "\n".join(["".join([_HEAD, *groups]), SPECS, SEEN, HAND_OFF, STAYING, EXIT_STATUS])


def usage_text() -> str:
    """The page that `-h` shows, which fits a small terminal."""
    common = (_help_of(option) for _, group in GROUPS for option in group if option.common)
    return "".join([_HEAD, "\nOptions most used\n", *common, "\n", EXIT_STATUS])


def _help_of(option: Option) -> str:
    import textwrap

    comma = ", " if option.short and option.long else "  "
    left = f"  {option.short or '  '}{comma}{option.long} {option.metavar}".rstrip()
    lines = textwrap.wrap(option.help, _WIDTH - _HELP_COLUMN, break_on_hyphens=False)
    if len(left) > _HELP_COLUMN - 2:
        lines.insert(0, "")
    rows = [left, *[""] * (len(lines) - 1)]
    return "".join(f"{row:<{_HELP_COLUMN}}{line}".rstrip() + "\n" for row, line in zip(rows, lines, strict=True))
