"""A command that is not ready, in words: what we wait for it to do, what it does instead, and what may help.

Nothing is waited for here, and nothing is decided.
"""

from __future__ import annotations

from portexec.admission.elsewhere import is_inner, likeliest, ways_from
from portexec.binding import tables
from portexec.lifetime.readiness import BAD_PATH, BAD_SERVER
from portexec.request import ACCEPT, HTTPS, LISTEN, NOTIFY, WEB_FORMS
from portexec.say import some

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from portexec.binding.listeners import Listener
    from portexec.lifetime.get import Get
    from portexec.lifetime.readiness import Readiness

_MANY = 3  # so many numbers are named
_USUAL_HINT = "--ready-timeout gives it more time, --ready says what to wait for"


class Unready:
    """The words for one start of a command, while it is not ready, and when the time is over."""

    def __init__(self, readiness: Readiness) -> None:
        self.readiness = readiness
        self.form = readiness.ready.form
        self.listeners = readiness.listeners

    def awaited(self) -> str:
        """What is waited for, in words that follow `waiting for the command to`."""
        return self._what(is_over=False)

    def missed(self) -> str:
        """The same when the time is over, in words that follow `it did not`."""
        return self._what(is_over=True)

    def hint(self, how_to_take: str, *, names_port: bool) -> str:
        """What may help when the time is over; `how_to_take` is the hint where the command took no connection of ours.

        `names_port`: words or variables of the command have a number of ours.
        """
        from_elsewhere = self._way_from_elsewhere(names_port=names_port)
        if from_elsewhere and "elsewhere" in self.readiness.start.shim.advised:
            return ""  # the shim has told people already
        asked = self.readiness.last_get()
        takes_none = how_to_take if self.form in (ACCEPT, *WEB_FORMS) else ""
        about_the_answer = takes_none if asked is None else self._hint_of(asked)
        return from_elsewhere or about_the_answer or _USUAL_HINT

    def _what(self, *, is_over: bool) -> str:
        if self.form == NOTIFY:
            said = self.readiness.start.said.status
            return f"send READY=1 to $NOTIFY_SOCKET{said and f' (it says: {said})'}"
        what = self._what_is_asked() if self.form in WEB_FORMS else self._what_is_missing()
        return f"{what}{self._where_else(is_over=is_over)}"

    def _what_is_missing(self) -> str:
        missing, verb = self.readiness.missing, "accept a connection"
        if self.form == LISTEN:
            missing, verb = self.readiness.not_listening(), "listen"
        shown = [self._shown(listener) for listener in missing or self.listeners]  # all where it does on all by now
        return f"{verb} on {some(shown)}"

    def _what_is_asked(self) -> str:
        wanted = "2xx or 3xx" if self.readiness.ready.argument else f"a status under {BAD_SERVER}"
        said = self._what_came()
        name = f" ({self.listeners[0].name})" if self._has_several() else ""
        return f"answer GET {self.listeners[0].url}{self.readiness.path}{name} with {wanted}{said and f'; it {said}'}"

    def _what_came(self) -> str:
        """What came of the GETs, in words that follow `it`; empty where nothing listens."""
        asked = self.readiness.last_get()
        if self.readiness.does_speak_tls:
            return "speaks TLS there"
        if asked is not None:
            return asked.text()
        is_there = self.listeners[0].socket is None and self.listeners[0].port in self._found()
        return "listens there and has taken no connection" if is_there else ""

    def _shown(self, listener: Listener) -> str:
        address = listener.path or f"{listener.host}:{listener.port}"
        return f"{listener.name} ({address})" if self._has_several() else address

    def _has_several(self) -> bool:
        """Whether the listeners were announced by their names."""
        return len(self.readiness.all) > 1

    def _hint_of(self, asked: Get) -> str:
        """What may help where the GET was not answered as it had to be."""
        if self.readiness.does_speak_tls:
            return "--ready https asks over TLS"
        if self.form == HTTPS and not asked.has_spoken_tls():
            return "--ready http asks without TLS"
        if self.readiness.ready.argument and BAD_PATH <= asked.status < BAD_SERVER:
            return f"--ready {self.form} takes any status under {BAD_SERVER}"
        ways = [f"--ready {self.form}:PATH asks for another path"] if asked.status else []
        ways += ["--ready-timeout gives it more time"] if asked.is_missing() else []
        without = LISTEN if self.listeners[0].socket is None else ACCEPT
        return ", ".join([*ways, f"--ready {without} waits for no answer"])

    # Another number than ours.

    def _where_else(self, *, is_over: bool) -> str:
        """That the command listens on another number, in words to append; empty where it does not."""
        others = ", ".join(map(str, self._others(self._found(), is_over=is_over)))
        return others and f"; it listens on port {others}"

    def _way_from_elsewhere(self, *, names_port: bool) -> str:
        """How the command gets our number instead of the one that it has. Empty where it has no other, or gets a descriptor."""
        found = self._found()
        unserved = [listener for listener in self._unserved(found) if listener.socket is None]
        others = self._others(found, is_over=True)
        if not unserved or not others:
            return ""
        name = "" if unserved[0] is self.listeners[0] else unserved[0].name
        return ways_from(others[0], is_named=names_port, can_remap=self.readiness.is_admitted, listener=name)

    def _found(self) -> dict[int, str]:
        """The numbers on which the command listens, each with an address."""
        return tables.listened_on_by(self.readiness.processes())

    def _others(self, found: Mapping[int, str], *, is_over: bool) -> list[int]:
        """Of the numbers in `found`, those that are not ours, where the command seems to serve there instead.

        While the command has time left, there are such numbers only if it listens on none of ours. A number that is probably
        for the command itself does not count, unless the time is over and there is nothing else.
        """
        ours = {listener.port for listener in self.readiness.all}
        others = {port: host for port, host in found.items() if port not in ours}
        is_elsewhere = ours.isdisjoint(found)
        if not (self._unserved(found) if is_over else is_elsewhere):
            return []
        if is_over and is_elsewhere:
            return likeliest(others)[:_MANY]
        return sorted(port for port, host in others.items() if not is_inner(port, host))[:_MANY]

    def _unserved(self, found: Mapping[int, str]) -> list[Listener]:
        """The listeners that we wait for, and that the command does not serve."""
        if self.form == NOTIFY:
            return []
        untaken = self.readiness.missing if self.readiness.last_get() is None else []
        awaited = self.listeners[:1] if self.form in WEB_FORMS else self.listeners
        return [one for one in awaited if (one.port not in found if one.socket is None else one in untaken)]
