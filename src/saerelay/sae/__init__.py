"""Sparse autoencoders on plain tensors: the trained object, its architectures, and its transfer in closed form.

Nothing here knows about language models, recipes or files. The fast paths are in `kernels`, tested against plain torch.
May import only the ground: `errors`, `site`, `spec`.
"""
