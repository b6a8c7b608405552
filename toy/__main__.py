"""`python -m toy` is `toy`."""

from toy.cli import main

main()
