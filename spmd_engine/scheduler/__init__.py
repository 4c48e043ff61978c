"""Runs only in the scheduler process. `adapter.py` and `cpu_platform.py` are the only modules that import sglang."""
