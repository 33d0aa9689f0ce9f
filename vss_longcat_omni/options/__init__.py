"""Options of a run: what can be set, how it is read, and what is an error at once."""
