"""What an EMO model is: its configuration, routing, reference implementation and checkpoint."""
