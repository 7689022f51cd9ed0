"""Algorithms on plain data: arrays and plans in, arrays and plans out."""
