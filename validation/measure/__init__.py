"""What is measured: predictions, routing and their summaries, as typed values."""
