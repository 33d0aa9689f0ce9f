"""Speech as codes, and what is heard in it."""
