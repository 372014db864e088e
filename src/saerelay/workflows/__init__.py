"""What each command does, from parsed options to the files it writes.

Workflows call the other wings in order, and contain no mathematics of their own.
May import everything but the command line.
"""
