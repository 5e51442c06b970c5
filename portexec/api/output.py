"""What a command writes: lines as they come, the last part of the output, and how much there was in all."""

from __future__ import annotations

LIMIT = 1 << 16  # the number of last bytes that are kept


class Lines:
    """Makes lines of the pieces in which an output comes. A line longer than LIMIT is passed on in parts, and not kept."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> bytes:
        """Take a piece, and return what can be passed on. An empty piece is the end of the output."""
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        text = whole + newline
        if not data or len(self._rest) > LIMIT:
            text, self._rest = text + self._rest, b""
        return text


class Output:
    """The output of one command. `written` counts all bytes; it is also the mark that `lines_since` takes."""

    def __init__(self) -> None:
        self.written = 0
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        """Take what came."""
        self.written += len(data)
        self._kept += data
        del self._kept[:-LIMIT]

    def add_line(self, line: bytes) -> None:
        """Take a line of our own, apart from one that the command has begun."""
        self.add((b"\n" if self._kept and not self._kept.endswith(b"\n") else b"") + line + b"\n")

    def text(self) -> str:
        """The part that is kept."""
        return self._kept.decode(errors="replace")

    def whole_lines_since(self, mark: int) -> tuple[str, int]:
        """The lines that are kept and were finished since the mark, and the mark after them."""
        begin = max(0, len(self._kept) - (self.written - mark))
        end = self._kept.rfind(b"\n", begin) + 1
        if end == 0:
            return "", mark
        return self._kept[begin:end].decode(errors="replace"), self.written - (len(self._kept) - end)

    def lines_since(self, mark: int, limit: int = LIMIT) -> str:
        """The whole lines that were written since the mark, at most the last `limit` bytes. A first line says what is left out.

        A line that began before the mark, and went on after it, is among them.
        """
        if self.written <= mark:
            return ""
        first_kept = self.written - len(self._kept)
        begin = max(mark, first_kept)
        if mark >= first_kept:
            begin = first_kept + self._kept.rfind(b"\n", 0, mark - first_kept) + 1
        shown = self._kept[max(begin - first_kept, len(self._kept) - limit) :]
        left_out = self.written - len(shown) - min(begin, mark)
        if left_out <= 0:
            return shown.decode(errors="replace")
        _, newline, whole = shown.partition(b"\n")
        if newline and whole:
            left_out += len(shown) - len(whole)
            shown = whole
        return f"[portexec: {left_out} bytes left out]\n{shown.decode(errors='replace')}"
