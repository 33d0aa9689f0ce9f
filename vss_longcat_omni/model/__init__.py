"""LongCat-Flash-Omni, our own code under the official parameter names."""
