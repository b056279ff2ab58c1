"""Emit a callable or an artifact from a lowered program; nothing here looks at the model.

`emit.py` chooses how. `inductor.py` hands the graph to TorchInductor's own front door, so that both of its caches key on the
rewritten graph; `layer_outputs.py` mends how it reads what a repeated layer returns. `interpreter.py` runs the graph op by op.
"""
