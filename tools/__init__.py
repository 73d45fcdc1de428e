"""Scripts that are run as they are, `python tools/NAME.py`, and what they share."""
