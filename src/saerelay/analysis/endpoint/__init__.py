"""Questions to a language model behind any OpenAI-compatible endpoint: no answer is paid for twice, no key is written.

Every answer is written to a file as it arrives, under the digest of its request; a question whose answer is on file is
not sent. Responses of the endpoint are not trusted: they are bounded in size and time, and treated as text only.
"""
