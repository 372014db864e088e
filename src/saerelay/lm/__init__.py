"""The language model: what it is, where its activations pass, and SAEs at work inside it.

Only this wing knows how Hugging Face models are built, except for the names of their modules, which are ground.
May import the ground, `sae` and `planning`.
"""
