"""The model families that are served: which one a directory holds, and the facts of its model."""
