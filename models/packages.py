"""Give short texts of very different lengths, each with one line that says the same: descriptions of Debian packages.

They come from the database of installed packages, so their number and content are those of the machine.
"""

import shutil
import subprocess
from dataclasses import dataclass

from effcompile.core.errors import EffError


@dataclass(frozen=True)
class Package:
    """Hold a package's name, its one-line synopsis and its long description."""

    name: str
    synopsis: str
    text: str


def package_descriptions() -> tuple[Package, ...]:
    """Return the installed packages that have a description, by name; of equal descriptions or synopses the first alone.

    Raises:
        EffError: EFF-U106 where there is no database of packages.
    """
    if shutil.which("dpkg-query") is None:
        raise EffError(
            "EFF-U106",
            "descriptions come from the database of Debian packages, and dpkg-query is not here",
            hint="run it on Debian or Ubuntu",
        )
    told = subprocess.run(
        ["dpkg-query", "-W", "-f=${Package}\\n${Description}\\n\\n"], capture_output=True, text=True, check=False
    )
    found = tuple(parse_descriptions(told.stdout))
    if told.returncode or not found:
        raise EffError(
            "EFF-U106", f"dpkg-query lists no package with a description: {told.stderr.strip()}", hint="dpkg-query -W"
        )
    return found


def parse_descriptions(listing: str) -> list[Package]:
    """Read records of a name, a synopsis and lines that begin with a space; ` .` stands for an empty line."""
    found: dict[str, Package] = {}
    texts: set[str] = set()
    synopses: set[str] = set()
    for record in listing.split("\n\n"):
        name, *lines = record.strip("\n").split("\n")
        body = [line[1:] for line in lines[1:] if line.startswith(" ")]
        text = "\n".join("" if line == "." else line for line in body).strip()
        if len(lines) < 2 or not text or text in texts or lines[0] in synopses or name in found:
            continue
        texts.add(text)
        synopses.add(lines[0])
        found[name] = Package(name, lines[0], text)
    return [found[name] for name in sorted(found)]
