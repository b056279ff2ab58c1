"""Define the selectors: ops that read q and k and say which blocks of attention to compute.

One method a file. Each returns a map bool `[B, Hq, ceil(Q / q_block), ceil(K / k_block)]` for `eff::attention_blocks_v1`, within
what the predicate allows and with the blocks that `BlockGrid.forced` names, so that no map empties a row. They are opaque to
TorchInductor, since their work depends on data, and cost a few matrix products that are small beside attention. No gradient flows
through them.
"""
