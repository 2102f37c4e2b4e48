"""Several replicas in virtual time: which one gets a request, and how many are needed."""
