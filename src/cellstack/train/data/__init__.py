"""Sequences from arrays, lists, frames, files, datasets and iterables."""
