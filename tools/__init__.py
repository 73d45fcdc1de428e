"""Scripts, run as `python tools/NAME.py`, and their shared code."""
