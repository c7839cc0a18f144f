"""Forecasts: what of a table a network sees, how it is trained, and how it stands beside simple rules."""
