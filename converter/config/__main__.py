"""`python -m converter.config` writes the Markdown reference of the configuration file."""

import sys

from converter.config.reference import reference_markdown

sys.stdout.write(reference_markdown())
