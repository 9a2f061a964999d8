"""Prompt sets with aligned positions: what detectors and analyses look at."""
