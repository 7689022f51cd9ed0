"""One story a mode."""
