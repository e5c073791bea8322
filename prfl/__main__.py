"""`python -m prfl` is `prfl`."""

from prfl.cli import main

main()
