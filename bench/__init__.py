"""Measure this project against its peers, side by side in one run.

A case (`cases/`, one a file) names rows: points of its parameters. For each row every arm (a way of running the same
module: eager, TorchInductor, ONNX Runtime, OpenVINO, eff) is prepared first, then the arms take turns, A B C A B C ...,
so that a machine that slows down slows all of them; ratios are taken within a round and only then summarized. An arm
that cannot run keeps its place with the reason.
Nothing here is installed: `eff bench` finds this folder beside the package in a checkout.
"""
