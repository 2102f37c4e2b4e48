"""The only part of the server that imports vLLM, and so the only part an upgrade can break."""
