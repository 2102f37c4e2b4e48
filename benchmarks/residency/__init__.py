"""Pools that come and go: policies in virtual time, loads, switching."""
