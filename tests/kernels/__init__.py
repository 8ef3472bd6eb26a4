"""Tests of the kernels, each against the families' own torch code."""
