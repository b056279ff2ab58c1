"""Keep compiled code of one processor from another.

TorchInductor's caches on disk know less of the processor than the code in them: the key of a graph's generated C++ does not name
the instruction set that it was written for (torch 2.11 to 2.15), and the key of a library says `-march=native` whatever that was.
A folder that several machines share, or one run with `ATEN_CPU_CAPABILITY`, is enough: code for vectors of 8 numbers was compiled
for vectors of 16, wrote zeros over what it had yet to read and past the end of its output, and no error told of it.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from pathlib import Path

# What tells one kind of processor from another, and nothing that changes while it runs.
_NAMED = re.compile(
    r"^(?:vendor_id|cpu family|model|cache size|flags|CPU implementer|CPU part|Features)\s*:.*$", re.MULTILINE
)
# Extensions that compilers write for, of all the abilities that Linux lists.
_USED = re.compile(
    r"ssse|sse|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|xop|gfni|v?aes|v?pclmul|sha|asimd|sve|i8mm|bf16|atomics|fp"
)


def cpuinfo() -> str:
    """Return what Linux tells of the processor's cores, '' elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@functools.cache
def fingerprint() -> str:
    """Return a short hash of the processor's model and instructions, all that a compiler's `-march=native` looks at."""
    lines = dict.fromkeys(_NAMED.findall(cpuinfo()))  # cores that are alike are named once
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *lines]).encode()).hexdigest()[:16]


@functools.cache
def instructions() -> tuple[str, ...]:
    """Return the extensions of the instruction set that compiled code may use here, as Linux names them; () elsewhere."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo(), re.MULTILINE)
    return tuple(sorted(word for word in set(found[1].split() if found else ()) if _USED.match(word)))


def marked(source: str) -> str:
    """Return C++ source with a comment that names this processor, so that a key made of the source names it too."""
    return f"{source.rstrip()}\n// compiled for processor {fingerprint()}\n"
