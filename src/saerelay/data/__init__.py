"""Text to token sequences on disk, and token sequences to shuffled blocks of activations.

A stream is the interface between training and the outside: the same call gives the same bits,
whether they are computed or read from a cache. May import the ground, `sae`, `planning` and `lm`.
"""
