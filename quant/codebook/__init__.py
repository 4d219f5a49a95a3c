"""The codebook grid: one scale for each group, sixteen levels that are not evenly spaced."""
