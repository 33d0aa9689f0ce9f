"""Speech as codes, and speech as text."""
