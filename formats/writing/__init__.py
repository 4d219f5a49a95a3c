"""A build on its way to disk: segments at their offsets, hashes, the journal."""
