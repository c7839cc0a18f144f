"""Forecasts: a network's inputs from a table, its training, and its comparison with simple rules."""
