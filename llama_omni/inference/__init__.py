"""Asks a trained model, and measures its answers."""
