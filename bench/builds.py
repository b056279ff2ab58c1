"""Time what is built for GPUs that are not here: engines of TensorRT-RTX, binaries of Triton kernels.

    python -m bench.builds rtx                    # four models for five chips, each built twice
    python -m bench.builds triton                 # every kernel for seven chips, from an empty cache, then again
    python -m bench.builds rtx --quick            # small models, two chips: does it work?

The times are of this machine's cores; no GPU takes part. `cpu_seconds` are those of all cores and child processes, which other
work on the machine does not change. Engines are compared byte for byte with a second build.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHIPS = "sm_80,sm_86,sm_89,sm_120,sm_121"
MODELS = ("zoo:smollm2-135m", "zoo:minilm-l6", "zoo:dinov2-s", "zoo:dit-4k")
SMALL = ("zoo:llama-tiny", "zoo:dit-tiny")
COMPUTES = "sm_80,sm_89,sm_90,sm_100,sm_120,gfx942,gfx950"


def cpu_seconds() -> float:
    """Return what this process and its children, as far as they have ended, took of all cores."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def rtx(quick: bool, dtype: str, models: list[str]) -> dict[str, Any]:
    """Export each model once, then build its engine again and compare."""
    import torch

    import effcompile as eff
    from effcompile.cli.models import load_model
    from effcompile.cli.parameters import parse_dtype

    chips, rows = "sm_86,sm_89" if quick else CHIPS, []
    for name in models or (SMALL if quick else MODELS):
        given = load_model(name, {"batch": 2, "seq": 16}, parse_dtype(dtype), real=True)
        with tempfile.TemporaryDirectory() as folder:
            steps: list[str] = []
            seconds, cores, hashes = [], [], []
            for place in ("a", "b"):
                begun, used = time.perf_counter(), cpu_seconds()
                made = eff.export(
                    given.model,
                    given.args,
                    given.kwargs,
                    to="tensorrt-rtx",
                    target=chips,
                    out=Path(folder, place),
                    name=name,
                    say=steps.append,
                )
                seconds.append(time.perf_counter() - begun)
                cores.append(cpu_seconds() - used)
                hashes.append({file: entry for file, entry in made.files if file.endswith((".engine", ".onnx"))})
        engine = sum(float(text.split()[-2]) for text in steps if text.startswith("built ")) / 2
        row = {
            "model": name,
            "dtype": dtype,
            "chips": chips,
            "seconds": seconds,
            "cpu_seconds": cores,
            "engine_seconds": engine,
            "engine_bytes": sum(entry.bytes for file, entry in made.files if file.endswith(".engine")),
            "attention": dict(made.details)["attention"],
            "same_bytes": hashes[0] == hashes[1],
            "error": max(check.error for check in made.checks),
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        del given
    return {"what": "rtx", "torch": torch.__version__, "cores": os.cpu_count(), "rows": rows,
            "seconds": sum(row["seconds"][0] for row in rows)}  # fmt: skip


def triton(quick: bool) -> dict[str, Any]:
    """Compile the catalog in an empty cache, then again."""
    import effcompile as eff
    from effcompile.codegen.triton import cross

    seconds, cores, count = [], [], "0"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "cache"))
        for place in ("a", "b"):
            begun, used = time.perf_counter(), cpu_seconds()
            catalog, chips = ("kernels:decode_merge", "sm_90,gfx942") if quick else ("kernels:all", COMPUTES)
            made = eff.export(catalog, to="triton", target=chips, out=Path(folder, place))
            seconds.append(time.perf_counter() - begun)
            cores.append(cpu_seconds() - used)
            count = dict(made.details)["binaries"]
    return {"what": "triton", "triton": cross.version(), "cores": os.cpu_count(), "binaries": int(count),
            "cold_seconds": seconds[0], "warm_seconds": seconds[1], "cpu_seconds": cores}  # fmt: skip


def main() -> None:
    """Print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rtx", "triton"))
    parser.add_argument("--quick", action="store_true", help="see that it works")
    parser.add_argument("--dtype", default="float32", help="of the models: float32, fp16")
    parser.add_argument("--models", nargs="*", default=[], help="other models than the four")
    given = parser.parse_args()
    print(
        json.dumps(
            rtx(given.quick, given.dtype, given.models) if given.what == "rtx" else triton(given.quick), indent=1
        )
    )


if __name__ == "__main__":
    main()
