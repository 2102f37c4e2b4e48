"""Model `auto`: choose a pool for each prompt."""
