"""Orchestration: checkpoint, recipe, plan, calibration and the order of work."""
