"""Speech: audio files, units and codecs, voices."""
