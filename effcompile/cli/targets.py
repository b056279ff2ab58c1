"""List the devices that code can be generated for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import dim, good, print_json, stdout, table

Name = Annotated[str | None, typer.Argument(help="One device or target, for all of its figures.", show_default=False)]


def targets(name: Name = None, as_json: given.AsJson = False) -> int:
    """List every device with its figures, the vendor's or modelled, and mark what is in this machine."""
    from effcompile.core.target import Target
    from effcompile.targets import devices

    catalog = devices()
    here = _here()
    if name is not None:
        device = Target.parse(name, catalog).device
        if as_json:
            print_json(device.to_json())
            return 0
        rows = [
            [key, _shown(value), dim("modelled") if key in device.modelled else ""]
            for key, value in device.to_json().items()
            if key != "modelled"
        ]
        stdout().print(table(device.name, ("field", "value", ""), rows))
        return 0
    if as_json:
        print_json({"devices": [{**device.to_json(), "target": device.word} for device in catalog], "here": here})
        return 0
    rows = []
    for device in catalog:
        half = next((kind for kind in ("bfloat16", "float16") if device.supports(kind)), "float32")
        present = (
            "this machine"
            if device.word in here or device.compute in here or (device.kind == "cpu" and "cpu" in here)
            else ""
        )
        rows.append(
            [
                device.word,
                device.name,
                device.compute,
                f"{_rate(device.peak(half) / 1e12)} {half}",
                f"{device.memory_bandwidth / 1e12:.3g}",
                f"{device.memory_bytes / 1e9:.0f}",
                "modelled" if "peak_flops" in device.modelled else "data sheet",
                good(present),
            ]
        )
    columns = ("target", "chip", "compute", "TFLOP/s", "TB/s", "GB", "rates", "")
    stdout().print(table("Targets", columns, rows, right=("TFLOP/s", "TB/s", "GB")))
    stdout().print(
        dim("write DEVICE or DEVICE:BACKEND, for example sm_90, h100, sm_120:tensorrt-rtx; eff targets NAME shows one")
    )
    return 0


def _here() -> list[str]:
    import torch

    from effcompile.targets.detect import detect

    found = [detect("cpu").device]
    if torch.cuda.is_available():
        found.append(detect("cuda").device)
    return [word for device in found for word in (device.word, device.compute)]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {rate:.3g}" for key, rate in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
