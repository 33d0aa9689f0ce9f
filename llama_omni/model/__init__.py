"""The model: its parts, loss and weights."""
