"""One training: data, networks, methods, the loop, its record and how it goes on."""
