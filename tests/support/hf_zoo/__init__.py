"""Build the model matrix: tiny transformers and diffusers models with random weights, and the ways they are called.

The model classes are the libraries' own, unmodified; only sizes and weights are ours. `cases()` lists them, a
`MatrixCase` builds one and holds its `Call`s, `run_call` runs a call on the module or on its compiled form, and
`outputs` turns any result into named tensors. Every size is small enough that a whole case compiles in seconds, and
every window and padding shorter than the text, so that a mask that is dropped or guessed changes the numbers.

`trace_call` also counts the graphs and breaks of Dynamo. `python -m tests.support.hf_zoo --accept` records those of
plain Dynamo; the record documents, and a claim about another backend compares with a live run.
"""

from tests.support.hf_zoo.catalog import case, cases
from tests.support.hf_zoo.dynamo import Trace, lost_by_dynamo, trace_call
from tests.support.hf_zoo.matrix import Call, Decode, MatrixCase, outputs
from tests.support.hf_zoo.run import run_call

__all__ = [
    "Call",
    "Decode",
    "MatrixCase",
    "Trace",
    "case",
    "cases",
    "lost_by_dynamo",
    "outputs",
    "run_call",
    "trace_call",
]
