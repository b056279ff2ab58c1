"""Give what token policies insert its meaning, as torch operations: chosen, taken, merged, put back.

They are written out into the graph and not called as ops of our own, so that any runtime that has torch's operations has them; what
is too large to be written out (`mass.py`) is an op.
"""
