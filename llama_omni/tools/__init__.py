"""Commands beside training: `python -m llama_omni.tools.NAME`."""
