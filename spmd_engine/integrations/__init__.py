"""Adapters for training frameworks. None is imported unless its framework asks for it."""
