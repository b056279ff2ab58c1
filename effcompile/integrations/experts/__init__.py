"""Replace the forward of modules whose experts no graph can show: loops over experts, and weights in forms of their own.

`catalog.py` says what happens to each class. `loops.py` reads a loop over a list of experts (`mlp.py` one of them) and writes the
method anew without it; the classes of transformers that its registry of experts does not reach have a file each, which knows their
code (`source.py`) and refuses any other. `pack.py` lays the weights of separate modules side by side and leaves their parameters as
views of that, so that names, `state_dict` and optimizers see what they saw before. `attach.py` decides call by call whether the
replacement runs: in training, under autocast, or where weights went elsewhere, the module's own code does.
"""
