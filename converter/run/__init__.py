"""A conversion from checkpoint to builds, and its manifest."""
