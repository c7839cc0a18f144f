"""Cells that a graph decomposes into products, sums and activations: single, unrolled, or as the body of a Scan."""
