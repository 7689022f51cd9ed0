"""Many conversions: which there are (`manifest`), what is up to date (`stamp`), how one runs
(`isolated`, `worker`), in which order and where all do (`run`), and what is written about them
(`summary`).
"""
