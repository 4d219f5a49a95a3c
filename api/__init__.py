"""What ``import lfmq`` offers and the commands call: whole tasks with their defaults."""
