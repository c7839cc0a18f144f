"""Adapters for other libraries: our estimators in their APIs, their models on our kernel. Each needs its library."""
