"""The language model: what it is, where its activations pass, and SAEs at work inside it.

Whatever depends on how Hugging Face models are built is here, and only here.
May import the ground, `sae` and `planning`.
"""
