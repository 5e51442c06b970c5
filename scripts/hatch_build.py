"""The README as a package index shows it, where links to other files of this repository would lead nowhere."""

from __future__ import annotations

import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Puts README.md into the metadata, with whole addresses."""

    def update(self, metadata: dict[str, Any]) -> None:
        with open(f"{self.root}/README.md", encoding="utf-8") as file:
            text = with_whole_addresses(file.read(), metadata["urls"]["Homepage"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_whole_addresses(text: str, home: str) -> str:
    """The text, whose pictures and links lead to the repository at `home`."""
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\1{home}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!\w+:|#)", rf"\1{home}/blob/main/", text)
