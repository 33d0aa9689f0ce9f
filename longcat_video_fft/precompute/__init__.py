"""Caches of latents and text embeddings, made before training."""
