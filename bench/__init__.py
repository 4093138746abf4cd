"""Our relay against stock derper, on one core each, in one run: `python -m bench`."""
