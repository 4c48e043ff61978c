"""The only place that names sglang."""
