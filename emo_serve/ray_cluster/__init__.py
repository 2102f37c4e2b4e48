"""Replicas on Ray Serve behind one address; the rules for them are in `emo_serve.cluster`."""
