"""The language model: what it is, where its activations pass, and SAEs at work inside it.

How Hugging Face models are built is known here and nowhere else, except for the names of their
modules, which are ground. May import the ground, `sae` and `planning`.
"""
