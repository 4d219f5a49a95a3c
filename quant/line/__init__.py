"""Grids with one scale, and perhaps an offset, for each group: ``w = scale * level + base``."""
