"""The HTTP front end: vLLM's OpenAI server with a pool chosen, leased and released a request."""
