"""Videos, pictures and sound, from file to tensor."""
