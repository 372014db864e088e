"""What each command does, from the question to the files it leaves.

Workflows call the other wings in order, and hold no maths of their own.
May import everything but the command line.
"""
