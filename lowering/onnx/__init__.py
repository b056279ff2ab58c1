"""Say what operators of an exported program look like in ONNX, one form a file; the folder is the registry.

A form names places in the lowered graph, the operator that stands there and a torch function with the same meaning. `lower.py` has
each one tried alone in ONNX Runtime before it takes its place, so that an operator that a runtime computes in another way never
gets into a file: the place then stays standard operators and the artifact says why. A form for another operation is another file.
Attention that no form took is written out by `attention.py` where the opset has no operator for it.
"""
