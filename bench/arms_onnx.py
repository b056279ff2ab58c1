"""Run the ONNX export of a workload in ONNX Runtime and OpenVINO, with torch's thread count and outputs uncopied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.arms import Arm, OnnxModel, Ready, Scratch
from bench.workload import Bound, Workload


class OnnxRuntime(Arm):
    """Run the ONNX file in ONNX Runtime's CPU provider, all optimizations on, float32."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    exports = True

    def refuses(self, workload: Workload) -> str | None:
        """Decline every dtype but float32."""
        if workload.device != "cpu":
            return "the CPU provider is what is compared here"
        if workload.dtype != torch.float32:
            return "ONNX Runtime's CPU provider has no bfloat16 kernels for these ops; it is compared in float32"
        return workload.no_export or None

    def prepare(self, workload: Workload, scratch: Scratch, threads: int) -> Ready:
        """Export and build the session."""
        model = scratch.onnx(workload)
        return self.load(model, threads)

    def load(self, model: OnnxModel, threads: int) -> Ready:
        """Build the session from a file."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Its workers would spin on after the call and slow the next arm down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        held = [ort.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])]
        taken = {item.name for item in held[0].get_inputs()}
        values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in model.feeds.items() if k in taken}
        # OrtValues in and out: the outputs stay where the session wrote them.
        call = lambda: held[0].run_with_ort_values(["out"], values)  # noqa: E731
        return Ready(Bound(call), _from_ort, lambda: {"threads": threads}, model.seconds, held.clear)


def _from_ort(outputs: Any) -> Tensor:
    return torch.from_numpy(outputs[0].numpy())


class OpenVino(Arm):
    """Run the ONNX file in OpenVINO's CPU plugin, with the precision hint of the row's dtype."""

    name = "openvino"
    title = "OpenVINO"
    exports = True

    def refuses(self, workload: Workload) -> str | None:
        """Decline what cannot be exported, and other devices."""
        if workload.device != "cpu":
            return "the CPU plugin is what is compared here"
        return workload.no_export or None

    def prepare(self, workload: Workload, scratch: Scratch, threads: int) -> Ready:
        """Export and compile; where the ONNX file cannot be had or read, convert the module itself."""
        import openvino as ov

        try:
            model = scratch.onnx(workload)
            return self.load(model, threads, workload.dtype)
        except Exception as error:
            module, tensors = workload.flat(torch.float32)
            converted = ov.convert_model(module, example_input=tuple(tensors.values()))
            feeds = {place: value.detach().cpu().numpy() for place, value in enumerate(tensors.values())}
            reason = f"converted from the module: {type(error).__name__}: {str(error)[:200]}"
            return self._compile(converted, feeds, threads, workload.dtype, 0.0, reason)

    def load(self, model: OnnxModel, threads: int, dtype: torch.dtype) -> Ready:
        """Compile a file."""
        import openvino as ov

        core = ov.Core()
        network = core.read_model(str(model.path))
        known = {name for port in network.inputs for name in port.names}
        feeds = {name: value for name, value in model.feeds.items() if name in known}
        return self._compile(network, feeds, threads, dtype, model.seconds, "converted from the ONNX file")

    def _compile(
        self, network: Any, feeds: Mapping[Any, Any], threads: int, dtype: torch.dtype, earlier: float, origin: str
    ) -> Ready:
        import openvino as ov

        hint = "bf16" if dtype == torch.bfloat16 else "f32"
        config = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = ov.Core().compile_model(network, "CPU", config)
        held = [compiled.create_infer_request()]
        call = lambda: held[0].infer(feeds, share_inputs=True, share_outputs=True)  # noqa: E731
        told = {
            "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
            "precision": str(compiled.get_property("INFERENCE_PRECISION_HINT")),
            "origin": origin,
        }
        return Ready(Bound(call), _from_openvino, lambda: told, earlier, held.clear)


def _from_openvino(outputs: Any) -> Tensor:
    return torch.from_numpy(outputs[0].copy())
