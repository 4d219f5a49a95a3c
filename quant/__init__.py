"""Numerics: arrays in, arrays out. Knows no file and no format."""
