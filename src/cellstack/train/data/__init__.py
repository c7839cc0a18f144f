"""Sequences as people have them: arrays, lists, frames, files, datasets, iterables."""
