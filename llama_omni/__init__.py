"""LLaMA-Omni training: Whisper encoder, speech projector, Llama, CTC speech generator."""
