"""What a pool is: its file, its maths, where pools come from. No server, no device memory."""
