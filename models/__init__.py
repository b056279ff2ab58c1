"""Hold the reference models that tests, the demo and the bench compile.

One file is one family: a frozen config with a `tiny` and a realistic preset, and a plain PyTorch module written the way
users of that family write it, because the recognizers have to cope with user code and not with ours. Three files give
trained models that ordinary PyPI wheels carry (`trained_*.py`); those are the unmodified transformers classes.

`zoo.py` finds models by reading this folder: every file that names its models in a constant `ENTRIES` takes part, and
nothing registers itself when imported. `entry.py` says what an entry is, `wheels.py` fetches, `cache.py` converts once,
`text.py` gives real text. transformers, onnx and gguf are imported inside functions only.

Random weights are drawn under a fixed seed and leave the caller's generator as it was.
"""
