"""What a language model makes of latents: an explanation of each from its examples, and how well it predicts firing.

After Paulo et al. 2024, "Automatically interpreting millions of features in large language models", and their tool
Delphi. An explanation is scored by what a reader can do with it: tell texts in which the latent fires from others
(detection), and tokens on which it fires from others of the same text (fuzzing). `pieces` draws the texts, `questions`
words the requests and reads the answers, `study` asks and writes `interpret/<id>.json`.
"""
