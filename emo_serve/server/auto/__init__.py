"""Model auto: which pool a prompt belongs in."""
