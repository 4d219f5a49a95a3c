"""Evidence: opens what was written and compares it with the reference."""
