"""Questions to a language model behind any OpenAI-compatible endpoint: no answer is paid for twice, no key is written.

Every answer is kept in a file as it arrives, under the digest of the request that it answers; a question whose answer
is on file is not sent. What comes from the endpoint is not trusted: it is bounded in size and time, and only ever text.
"""
