"""Tables as people have them: which columns hold what, read as time series on an even grid."""
