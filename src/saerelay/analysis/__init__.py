"""The measurements of a finished run, from its directory and its language model.

Each analysis writes one document, which records the question it answers; the same question is not measured twice.
May import the ground, `sae`, `planning`, `lm`, `data` and `runs`.
"""
