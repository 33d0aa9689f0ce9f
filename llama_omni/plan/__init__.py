"""Predicts memory, disk and time, before anything is loaded."""
