"""Turn a model into a `Program`: pre-dispatch ATen graphs, for both ways in.

`dynamo.py` traces the graph that Dynamo hands to a backend once more; `export.py` reads an ExportedProgram. Both keep symbolic
sizes, in-place writes, and the user's source lines, and both name every parameter. Nothing here changes meaning.
"""
