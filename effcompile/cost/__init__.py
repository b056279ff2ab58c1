"""Price a site before anything runs: sympy costs, a roofline, and the length from which a rewrite pays.

`symbolic.py` gives `Cost`s (FLOP, bytes, exponentials, passes) as sympy expressions in the sizes of a site;
`cascade.py` derives the number of passes of an einsum cascade (FuseMax), `io_bounds.py` holds the least possible
traffic of exact attention (Saha and Ye), `eflops.py` the FLOP-equivalent price of a whole generation (Kinetics).
`roofline.py` turns a cost into seconds on a `Device` and fits the efficiencies to measured points; `crossover.py`
compares two costs over a range of lengths. A figure that comes out of here is *modelled* until measured points stand
behind it, and says so; its fit error travels with it.

Two densities are kept apart everywhere. The *block* density (visited blocks / all blocks) is what a kernel pays for;
the *pair* density (kept pairs / all pairs) is what the model asked for and what quoted TFLOP/s count.

Where the published model was wrong or loose and this folder departs from it: the number of tokens read under a budget
is exact here (`eflops.tokens_read`); deferred division turns the three-pass softmax into two passes by the dependence
analysis itself, which is also what its smaller spill says; selector costs count a multiply-add as two FLOP.
"""
