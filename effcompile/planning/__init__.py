"""Decide, and say why.

`planner.py` asks each kernel about each site and takes the cheapest that can run it exactly; `replay.py` follows a plan that was
given; `explain.py` holds the report that the command line prints; `ledger.py` measures the error that each pass adds. Nothing here
touches a graph.
"""
