"""Text: a model of characters or bytes, from a book to a stream of characters."""
