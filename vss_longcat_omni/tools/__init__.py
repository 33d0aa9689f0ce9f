"""Commands beside training: `python -m vss_longcat_omni.tools.NAME`."""
