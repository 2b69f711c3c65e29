"""The nouns of Hostler, their states, limits, units and errors. Plain values: no I/O, no clock, no randomness."""
