"""Several servers behind one address: which of them gets a request. Pure code; nothing waits."""
