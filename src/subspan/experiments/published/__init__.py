"""Published experiments, one a file; importing one registers it."""
