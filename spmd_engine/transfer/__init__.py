"""Moves bytes; runs in either process."""
