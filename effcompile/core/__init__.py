"""Hold the values that stages pass to each other.

Nothing here looks at a model, a device or the environment. A stage may import `core`, never another stage; that is what
keeps a wrong number traceable to one place: a wrong plan or a wrong rewrite.

`expr` is the one idea that is not plain data: a mask is an *expression* over (batch, head, query index, key index), so that
it can be printed, proved equal to a named family, evaluated on a tile, and bounded on a block without ever existing as a tensor.
"""
