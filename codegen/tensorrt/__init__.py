"""Build TensorRT and TensorRT-RTX engines from ONNX, and run them where there is a GPU.

TensorRT-RTX builds for chips that are not here: it selects no kernels until the engine meets its GPU, so a build takes
seconds, and names and addresses that differ between runs are kept from it. The builder may abort or hang, so it runs in a
process of its own (`rtx_child.py`, started by `child.py`) that imports nothing of ours. What it says in its log becomes an error
with a code (`complaints.py`). Classic TensorRT times kernels on the GPU it builds for: where that is missing the files and a
script to finish there (`build_engine.py`) are written.
"""
