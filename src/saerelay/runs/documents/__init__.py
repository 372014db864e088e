"""The JSON files of a run as frozen types: each is written by one command and read by others.

One module per subject; docs/run-directory.md is made from the docstrings of their fields.
"""
