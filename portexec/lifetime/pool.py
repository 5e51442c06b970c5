"""All shims of a run, and the generations below them that are alive: starting, telling, waiting, clearing away."""

from __future__ import annotations

import anyio

from portexec.lifetime.start import Generation
from portexec.parent import tree
from portexec.parent.shim import Job, Shim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.command.plan import Plan
    from portexec.parent.signals import Inbox


class Pool:
    """The owner of the shims, of which the first is there already and began at this time, if it did (`Generation.began`).

    `others` are children of this process that are no shims, from the time before it was portexec.
    """

    def __init__(
        self, first: Shim, began: float | None, job_for: Callable[[Plan], Job], inbox: Inbox, others: set[int]
    ) -> None:
        self.shims = [first]
        self.began = began
        self.others = others
        self.live: list[Generation] = []
        self._job_for = job_for
        self._inbox = inbox

    def new_shim(self, plan: Plan) -> Shim:
        """Fork another shim. Raises OSError when resources run out."""
        shim = Shim(self._job_for(plan), self._inbox)
        self.shims.append(shim)
        return shim

    def dismiss(self, shim: Shim) -> None:
        """End a shim whose tree is gone."""
        if shim in self.shims:
            self.shims.remove(shim)
            shim.leave()

    def stop_all(self, word: bytes) -> None:
        """Stop all that is alive, with STOP or KILL."""
        for generation in self.live:
            generation.stop(word)

    async def all_gone(self) -> None:
        """Wait until nothing of any is left."""
        for generation in list(self.live):
            await generation.gone.wait()

    async def clear_away(self, kill_after: float) -> None:
        """Stop whoever is below us and below no shim: one that was killed has left it behind."""
        stop = tree.Stop(kill_after, spare=self.others | {shim.pid for shim in self.shims})
        while stop.step():
            await anyio.sleep(stop.pause())

    def dismiss_all(self) -> None:
        """End the shims, which run nothing."""
        for shim in list(self.shims):
            self.dismiss(shim)
