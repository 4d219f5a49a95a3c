"""Byte layouts: one module for each container."""
