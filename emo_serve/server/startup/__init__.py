"""What is decided before the engine starts, and what is said once it has."""
