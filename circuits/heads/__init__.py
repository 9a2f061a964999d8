"""Detectors of what attention heads do, one file each, and the statistics that turn scores into labels."""
