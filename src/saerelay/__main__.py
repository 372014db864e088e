"""`python -m saerelay` is the command line."""

from saerelay.cli import main

main()
