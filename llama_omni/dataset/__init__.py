"""Turns dataset files into batches."""
