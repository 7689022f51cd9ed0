"""`python -m converter` is `qconvert`."""

from converter.start import main

main()
