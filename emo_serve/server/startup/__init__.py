"""Decisions before the engine starts, and what is printed during and after the start."""
