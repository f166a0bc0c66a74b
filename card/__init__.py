"""The check of a graphics card: `python card.py`. What runs inside the host is imported as a part of the pack."""
