"""Networks step by step: a `Stream` has a fixed batch, a `Sessions` pool opens and closes sessions at any time."""
