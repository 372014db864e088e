"""What is measured of a finished run, from its directory and its language model.

Each analysis writes one document that says what was asked, and is not made twice for the same question.
May import the ground, `sae`, `planning`, `lm`, `data` and `runs`.
"""
