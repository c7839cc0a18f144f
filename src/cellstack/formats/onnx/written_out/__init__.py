"""Cells that a graph writes out as products, sums and activations: alone, step by step, or as the body of a Scan."""
