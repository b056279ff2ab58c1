"""Run the main job on real weights and real text, three ways side by side.

`arm.py` is one way of running the model, in a process of its own: neither the peak of a process nor the code it has
compiled goes back. `measure.py` lets the arms take turns, so that a machine that slows down slows all of them.
`results.py` is what came out, `picture.py` and `page.py` draw it, `circumstances.py` says what it was measured on and
how quiet that machine was.
"""
