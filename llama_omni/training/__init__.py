"""Runs the training loop and what it drives."""
