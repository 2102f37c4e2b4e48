"""The only part of the server that knows vLLM; an upgrade breaks this or nothing."""
