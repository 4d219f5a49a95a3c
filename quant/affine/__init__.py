"""The affine grids: a scale and an offset for each group."""
