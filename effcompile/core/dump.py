"""Write numbered text of every stage into a folder (EFF_DUMP=dir); a `Dump` without a folder does nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from effcompile.core.program import Program, text


@dataclass
class Dump:
    """Number the files in the order in which stages wrote them."""

    folder: Path | None = None
    written: list[str] = field(default_factory=list)

    def program(self, name: str, program: Program) -> None:
        """Write a program as text."""
        if self.folder is not None:
            self.text(f"{name}.txt", text(program))

    def text(self, name: str, content: str) -> None:
        """Write one file."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        numbered = f"{len(self.written):02d}_{name}"
        (self.folder / numbered).write_text(content)
        self.written.append(numbered)

    def beside(self, name: str) -> Dump:
        """Return a dump into a folder of that name beside the files of this one."""
        return Dump(None if self.folder is None else self.folder / name)
