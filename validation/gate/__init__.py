"""The release gate: limits and the verdict."""
