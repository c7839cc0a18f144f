"""Text models: train a model of characters or bytes on a text, and generate text with it."""
