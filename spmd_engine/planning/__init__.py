"""Pure planning: NumPy, msgspec and errors only."""
