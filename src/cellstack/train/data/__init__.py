"""Sequences from arrays, lists, frames, files and datasets."""
