"""`cellstack demo`: train, run and inspect two networks on recorded speech. `data/` has the sample data."""
