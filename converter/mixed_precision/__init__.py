"""Which grid each weight gets under a size limit, and the KL divergence that predicts."""
