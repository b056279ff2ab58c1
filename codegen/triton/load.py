"""Load and launch the kernels of an exported folder through the driver's own library, with Python's standard library alone.

    library = Library("out")
    flash = library.kernel("flash-bf16-d128-right")        # the binary for the GPU that is here
    flash.launch((programs,), [q, k, v, out, lse, ...])    # tensors with data_ptr(), addresses and numbers, in `arguments`' order

An artifact has this file beside `kernels.json`, which lists for every binary its arguments, threads and shared memory. Machine code
runs whatever its maker wrote: the hashes in `manifest.json` are checked, whose folder it is only you can know.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TYPES = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "u8": ctypes.c_uint8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
_NAMES = {
    "cuda": ("libcuda.so.1", "nvcuda.dll", "libcuda.so"),
    "rocm": ("libamdhip64.so", "libamdhip64.so.6", "libamdhip64.so.7"),
}
_LARGE = 48 * 1024  # bytes of shared memory beyond which a kernel has to be told


class LoadError(RuntimeError):
    """Say why a kernel cannot be loaded or launched; the message begins with a stable code."""


class Kernel:
    """Hold a loaded binary; `facts` is its entry in `kernels.json`."""

    def __init__(self, driver: Any, handle: Any, facts: dict[str, Any]) -> None:
        self._driver, self._handle, self.facts = driver, handle, facts

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], stream: int = 0) -> None:
        """Launch `grid` programs (one to three sizes) on a stream (0: the default one); it returns before they end.

        Raises:
            LoadError: EFF-E157 for other arguments than the kernel's, and where the driver refuses.
        """
        wanted = self.facts["arguments"]
        if len(arguments) != len(wanted):
            names = ", ".join(each["name"] for each in wanted)
            raise LoadError(f"EFF-E157 {len(arguments)} arguments given, {len(wanted)} wanted: {names}")
        values = [_value(given, each) for given, each in zip(arguments, wanted)]
        values += [ctypes.c_void_p(None)] * (self.facts["parameters"] - len(wanted))  # scratch memory, which none uses
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        x, y, z = (*map(int, grid), 1, 1)[:3]
        where = ctypes.c_void_p(stream)
        self._driver.call(
            "LaunchKernel", self._handle, x, y, z, self.facts["threads"], 1, 1, self.facts["shared"], where, pointers, None
        )  # fmt: skip


def _value(given: Any, wanted: dict[str, Any]) -> Any:
    kind, name = wanted["type"], wanted["name"]
    if not kind.startswith("*"):
        if kind not in _TYPES:
            raise LoadError(f"EFF-E157 `{name}` is of type {kind}, which this loader does not pass")
        return _TYPES[kind](given)
    address = int(given.data_ptr()) if hasattr(given, "data_ptr") else int(given)
    if wanted["aligned"] and address % 16:
        raise LoadError(f"EFF-E157 `{name}` lies at {address:#x}; the binary was compiled for multiples of 16 bytes")
    return ctypes.c_void_p(address)


class _Driver:
    """Call the CUDA driver, or HIP, whose functions have the same names behind a prefix."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        for name in _NAMES[kind]:
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise LoadError(
                f"EFF-E156 no {'CUDA' if kind == 'cuda' else 'ROCm'} driver on this machine ({' or '.join(_NAMES[kind])})"
            )
        if kind == "cuda":
            self.call("Init", 0)

    def call(self, name: str, *arguments: Any) -> None:
        prefix = "cu" if self.kind == "cuda" else "hipModule" if name == "LaunchKernel" else "hip"
        status = getattr(self._library, prefix + name)(*arguments)
        if status:
            raise LoadError(f"EFF-E157 {prefix}{name} returned {status}")

    def compute(self) -> str:
        """Return the capability of the first GPU (`sm_90`) and make its primary context the current one."""
        device = ctypes.c_int()
        self.call("DeviceGet", ctypes.byref(device), 0)
        if self.kind == "rocm":
            raise LoadError("EFF-E157 name the chip of an AMD GPU: kernel(name, 'gfx942')")
        context = ctypes.c_void_p()
        self.call("DevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("CtxSetCurrent", context)
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            number = ctypes.c_int()
            self.call("DeviceGetAttribute", ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        return f"sm_{numbers[0]}{numbers[1]}"

    def load(self, code: bytes, symbol: str, shared: int) -> Any:
        """Return the function `symbol` of a binary."""
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("ModuleLoadData", ctypes.byref(module), code)
        self.call("ModuleGetFunction", ctypes.byref(handle), module, symbol.encode())
        if shared > _LARGE and self.kind == "cuda":
            self.call("FuncSetAttribute", handle, 8, shared)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        return handle


class Library:
    """List the kernels of a folder, and load them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, Any] = json.loads((self.folder / "kernels.json").read_text(encoding="utf-8"))
        self._hashes = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["files"]

    def names(self) -> list[str]:
        """Return the names of the kernels."""
        return sorted({each["name"] for each in self.facts["kernels"]})

    def kernel(self, name: str, compute: str = "") -> Kernel:
        """Load a kernel for a chip, by default the one that is here; a name may leave out the digest at its end.

        Raises:
            LoadError: EFF-E156 where there is no driver, EFF-E157 for a name or a chip that the folder does not have.
        """
        same = [each for each in self.facts["kernels"] if name in (each["name"], each["name"].rpartition("-")[0])]
        if not same:
            raise LoadError(f"EFF-E157 no kernel `{name}`; there are {', '.join(self.names())}")
        driver = _Driver("rocm" if compute.startswith("gfx") else "cuda")
        here = compute or driver.compute()
        fitting = [each for each in same if each["compute"] == here]
        if len(fitting) != 1:
            have = ", ".join(f"{each['name']} for {each['compute']}" for each in same)
            raise LoadError(f"EFF-E157 {len(fitting)} binaries of `{name}` for {here}; there are {have}")
        (facts,) = fitting
        code = (self.folder / facts["code"]).read_bytes()
        if hashlib.sha256(code).hexdigest() != self._hashes[facts["code"]]["sha256"]:
            raise LoadError(f"EFF-E105 {facts['code']} is not the file that was written")
        return Kernel(driver, driver.load(code, facts["symbol"], facts["shared"]), facts)
