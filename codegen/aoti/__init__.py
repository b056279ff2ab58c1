"""Compile a program ahead of time with AOTInductor: a `.pt2` of machine code without weights, which lie beside it as safetensors.

A package without its constants crashes the process when it is called, so `session.py` hands out nothing before every constant is
loaded. Ops of this project stay calls in the package and are looked up when it is loaded: `effcompile.ops.register()` comes first.
"""
