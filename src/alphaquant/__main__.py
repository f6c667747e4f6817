"""`python -m alphaquant` is the command."""

from alphaquant.cli import main

main()
