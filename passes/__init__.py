"""Rewrite programs as the plan says.

One pass a file: a frozen dataclass with a name, a phase, and `run(program, plan)`. `recognize/` raises many spellings to one op;
everything beside it only rewrites what was raised or lowered. A pass is found because its file is here; `compiler.py` orders them
by phase and by what each must come after.
"""
