"""Raise the many spellings of one operation to one `eff::` op and a `Site`.

Recognition never approximates and never reads example values. `elements.py` + `element_rules.py` answer what one element of a
graph value is; `mask.py` turns that into a predicate with its fill and empty-row rule; `sdpa.py` and `softmax_chain.py` find the
two families of attention spellings; `attention.py` raises what they found and says why the rest was left alone.

Reading masks by element (pull, from the attention back to arange) instead of matching op sequences is what keeps this from
breaking with each transformers release: any composition of known pointwise, view and indexing ops is understood.
"""
