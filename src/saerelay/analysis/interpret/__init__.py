"""Explanations of latents by a language model, made from examples, and scores of how well they predict firing.

After Paulo et al. 2024, "Automatically interpreting millions of features in large language models", and their tool
Delphi. An explanation is scored by how well a reader who knows it can distinguish texts in which the latent fires from
others (detection), and tokens on which it fires from others of the same text (fuzzing). `pieces` draws the texts,
`questions` words the requests and reads the answers, `study` asks and writes `interpret/<id>.json`.
"""
