"""Sparse autoencoders on plain tensors: the trained object, its architectures, and its transfer in closed form.

Nothing here knows a language model, a recipe or a file. What is fast is in `kernels`, tested against plain torch.
May import only the ground: `errors`, `site`, `spec`.
"""
