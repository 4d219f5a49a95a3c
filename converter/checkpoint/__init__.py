"""A checkpoint folder: found, opened, checked."""
