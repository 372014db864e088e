"""The JSON files of a run as frozen types: what each command writes, and what others read.

One module per subject; docs/run-directory.md is made from the texts below their fields.
"""
