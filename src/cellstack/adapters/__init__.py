"""The estimators of `cellstack.sklearn` as those of other libraries of time series; each module needs its library."""
