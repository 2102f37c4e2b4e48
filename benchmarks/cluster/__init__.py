"""Several replicas, simulated and real: which one gets a request, how many are needed, what if."""
