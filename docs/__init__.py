"""The documentation: pages written by hand here, and in `making` what makes the others."""
