"""The model: names and shapes of its tensors, the reference forward pass, its text."""
