"""From photo files to picture files: decode, run a network or an optimiser, encode."""
