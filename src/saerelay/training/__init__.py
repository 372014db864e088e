"""Runs a plan: `train` is the loop, and the file to read first; `engine` is one step of it.

Watching never changes training: progress displays and loggers are told what happens, and cannot influence it.
May import the ground, `sae`, `planning`, `lm`, `data` and `runs`; never `interop`, never `analysis`.
"""
