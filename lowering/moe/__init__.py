"""Run the experts of a layer after routing: one dispatch a file, all exact up to rounding, priced in `price.py`.

`fused` is our own code on CPU, `block-aligned` on GPUs, where it runs on request until it has been measured; both serve any number
of tokens. Elsewhere `batched` pays for a few tokens, `grouped` for many, `dense` where nearly every token wants every expert, and
`loop` runs what nothing else can. Weights stay as the model has them.
`capacity` is the dispatch of experts that take a number of tokens each: it moves rows, and the graph's own experts run in between.
"""
