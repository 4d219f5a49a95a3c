"""Builds asked to do chat tasks."""
