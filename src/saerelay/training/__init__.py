"""Runs a plan: `train` is the loop, and the file to read first; `engine` is one step of it.

Looking at training never changes it: progress and trackers are told, and answer nothing.
May import the ground, `sae`, `planning`, `lm`, `data` and `runs`; never `interop`, never `analysis`.
"""
