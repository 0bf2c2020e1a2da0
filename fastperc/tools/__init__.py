"""What tells of this machine: how fast it is, and which backend runs each operation on it."""
