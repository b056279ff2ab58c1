"""List the chips that the compiler knows, and look at the one that is here.

`nvidia.py`, `amd.py` and `cpu.py` hold one `Device` value per chip with the link of its data sheet. The rates are the
dense ones, for matrix units with 32-bit accumulation, and sizes are the vendor's decimal gigabytes. What no data
sheet states is derived in sight (units per clock times clock) and its field is named in `Device.modelled`, so that a
report can tell a figure of the vendor from one of ours. `detect.py` is the only place of the whole package that asks
the machine anything; it finds the `Target` of this machine and, in about a second, measures what a CPU really does.

A compute word such as `sm_90` picks the common chip of that capability; the chip's own name picks exactly that chip.
A user's device is one more `Device` value handed to `Target.parse` beside these.
"""

from __future__ import annotations

from effcompile.core.target import Device


def devices() -> tuple[Device, ...]:
    """Return every built-in device, NVIDIA first, then AMD, then the nominal CPU."""
    from effcompile.targets import amd, cpu, nvidia

    return (*nvidia.DEVICES, *amd.DEVICES, *cpu.DEVICES)
