"""Commands beside training: `python -m longcat_video_fft.tools.NAME`."""
