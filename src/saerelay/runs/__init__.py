"""A run directory: its paths, the files in it, and the finished suite that it holds.

The directory on disk is the only interface between commands; everything is written under a temporary name and renamed.
May import the ground, `sae`, `planning`, `lm` and `data`.
"""
