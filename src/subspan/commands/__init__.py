"""The command line, a file for each command; :mod:`subspan.cli` dispatches."""
