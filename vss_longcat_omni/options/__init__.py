"""Options of a run: what can be set, read and refused."""
