"""Rewrite attention by policies of the family AttentionPattern, one file each; `rewrite.py` applies what the plan names.

A static pattern (`sliding-window`, `sink-window`) is intersected with the mask's predicate, and exact kernels run what is left.
A dynamic one inserts a selector, an op that reads q and k and returns a block map, and an attention op that computes only those
blocks. Three rules hold for all of them. A mask is narrowed, never replaced. A row is empty only where it was empty before. What
is not rewritten has a reason: a policy refuses a site (EFF-A5xx), and the refusal is in the plan.
"""
