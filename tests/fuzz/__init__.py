"""Coverage-guided fuzzing of every parser that strangers, or broken files, can reach: `python -m tests.fuzz`.

`targets` has one module per target, `corpus` the inputs that found something, `engine` runs one target under
atheris, and `campaign` runs many of them and sums up.  Without atheris the corpus is still replayed.
"""
