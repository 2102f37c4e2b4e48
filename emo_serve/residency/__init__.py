"""Which experts are in device memory, and which pools keep them there. Standard library only."""
