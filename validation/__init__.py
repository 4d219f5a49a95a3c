"""Evidence: what was written, opened again and compared with the reference."""
