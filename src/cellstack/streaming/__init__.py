"""Networks frame by frame: `Stream` has rows of its own, the rows of `Sessions` come and go."""
