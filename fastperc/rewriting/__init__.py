"""Networks that this library did not write: traced, and run with its convolutions."""
