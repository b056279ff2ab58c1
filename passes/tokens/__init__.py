"""Let later layers work on fewer tokens, as a plan says: one policy a file, `rewrite.py` for all of them.

The rewrite walks along a stream (`passes/recognize/tokens.py`). From the first shortened value on it makes every operation of
the stream anew, on fewer tokens; each shortening begins an *epoch*. An operand of an older epoch, or from outside the stream,
is brought to the epoch of the operation: it loses the same tokens. Masks are predicates over positions and stay exact: positions of
the tokens that are left are one more tensor that the predicate reads. What needs every token gets the tokens at their places:
a dropped token has the value with which it was dropped, a merged one that of the token it became part of.
"""
