"""Read tables as time series on an even grid, and detect the meaning of their columns."""
