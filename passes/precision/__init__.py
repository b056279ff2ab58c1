"""Compute attention in narrower numbers: policies of the family AttentionPrecision, one file each.

They are asked after the policies of `passes/attention`, about the site as those leave it, and rewrite what those insert.
"""
