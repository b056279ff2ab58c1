"""Be the command line: one verb a file.

A module of this folder that defines a function of its own name is a verb (`doctor.py` has `doctor`); a tuple `VERBS`
makes it a group (`cache.py` has `verify`, `clear`, `export`). `main.py` finds them, so that adding a file adds a verb.
A verb prints tables on stdout, or one JSON value with `--json`; progress goes to stderr. It returns its exit code: 0
done, 1 the check failed, 2 bad usage, 3 a contract was broken or the target cannot do it, 4 our own fault. Errors are
raised, `main.py` prints them.
"""
