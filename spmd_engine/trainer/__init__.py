"""Runs in the trainer rank only; never imports `scheduler`."""
