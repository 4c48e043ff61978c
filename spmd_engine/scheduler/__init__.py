"""The scheduler process. Only `adapter.py`, `starting.py`, `cpu_platform.py` and `on_paper.py` import sglang."""
