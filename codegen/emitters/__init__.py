"""Hold the forms of an export, one a file: `eff export --to NAME` finds the file whose emitter has that name.

A file says which targets its form can do, or why not and what to use in place of it, and imports what it needs only when it is
asked to write or to run. What is larger than a file lies beside this folder (`codegen/onnx/`, `codegen/tensorrt/`,
`codegen/triton/`, `codegen/aoti/`).
"""
