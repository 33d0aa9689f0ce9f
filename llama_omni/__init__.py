"""Trains LLaMA-Omni: Whisper encoder, speech projector, Llama, CTC speech generator."""
