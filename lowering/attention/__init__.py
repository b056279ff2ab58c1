"""Lower `eff::attention_v1`: one kernel a file, each exact where it says `Supported`.

On two cores with AVX-512, torch's flash SDPA runs a causal mask at 1.4x of FlexAttention's C++ template per useful flop (2x in
bf16), and a dense mask at 1.1x of no mask at all. So on CPU a predicate is best served by SDPA on slices: `padded` (a sequence's
own keys) and `blocked` (a block of queries on the keys it can keep). FlexAttention serves score functions (softcap, ALiBi), and
every predicate on CUDA.
"""
