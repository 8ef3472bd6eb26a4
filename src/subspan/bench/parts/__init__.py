"""The parts of the benchmark, one file each: a file here that makes a Part has added it."""
