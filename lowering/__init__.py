"""Turn every `eff::` dense op into a kernel that the target has.

A kernel is asked whether it can run a site exactly; its refusal is a reason that the user sees. `attention/` has one kernel a
file, `lower.py` replaces the ops as the plan says, `linear.py` picks the GEMM. Nothing here decides: the planner did.
"""
