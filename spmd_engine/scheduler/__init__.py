"""Runs in the scheduler process only; never imports `trainer`. Only `adapter` names sglang."""
