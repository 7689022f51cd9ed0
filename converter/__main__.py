"""`python -m converter` is `qconvert`."""

from converter.cli import main

main()
