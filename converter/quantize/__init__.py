"""The order of work: weight by weight, or layer by layer from calibration tokens."""
