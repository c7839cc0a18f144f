"""cellstack in other libraries: our estimators as theirs, their models on our kernel; each module needs its library."""
