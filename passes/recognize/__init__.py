"""Raise the many spellings of one operation to one `eff::` op and a `Site`.

Recognition never approximates and never reads example values. `elements.py` + `element_rules.py` answer what one element of a
graph value is; `mask.py` turns that into a predicate with its fill and empty-row rule; `sdpa.py`, `softmax_chain.py` and `flex.py`
find the three families of attention spellings; `attention.py` raises what they found and says why the rest was left alone. A
FlexAttention call spells its mask twice, as a function (`mods.py`) and as lists of blocks: both must say the same
(`block_lists.py`).

Reading masks by element (pull, from the attention back to arange) instead of matching op sequences is what keeps this from
breaking with each transformers release: any composition of known pointwise, view and indexing ops is understood.
"""
