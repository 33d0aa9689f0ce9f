"""LongCat-Audio-Codec, our own code under the official parameter names; codec.py opens it."""
