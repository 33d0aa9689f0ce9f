"""Options of a run: how they are set, read and checked."""
