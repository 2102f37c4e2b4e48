"""Pools on the running server: the routes of /v1/pools and what is behind them."""
