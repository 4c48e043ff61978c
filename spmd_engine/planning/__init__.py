"""Pure planning: NumPy and errors only."""
