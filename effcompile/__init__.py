"""Compile transformers, mixture-of-experts and diffusion models through exact, explained rewrites.

    fast = torch.compile(model, backend="eff")

Importing this package imports neither transformers nor ONNX nor TensorRT, and touches no device.
"""

from effcompile.backend import FallbackWarning, backend
from effcompile.core.errors import EffError
from effcompile.core.schedule import Denoising
from effcompile.explaining import explain
from effcompile.exporting import export, load
from effcompile.integrations.diffusers import diffusers
from effcompile.integrations.sampler import sampler
from effcompile.integrations.sampler_files import load_sampler
from effcompile.integrations.transformers import kv_cache, prepare
from effcompile.integrations.transformers_ranges import calibrate_kv
from effcompile.report import summary as report
from effcompile.runtime.sampler import Regions
from effcompile.switches import off

__version__ = "0.1.0"

__all__ = [
    "Denoising",
    "EffError",
    "FallbackWarning",
    "Regions",
    "__version__",
    "backend",
    "calibrate_kv",
    "diffusers",
    "explain",
    "export",
    "kv_cache",
    "load",
    "load_sampler",
    "off",
    "prepare",
    "report",
    "sampler",
]
