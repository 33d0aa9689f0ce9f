"""Speech: audio files, units, voices."""
