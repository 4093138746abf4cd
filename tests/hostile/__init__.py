"""A real relay process under attack, while a well-behaved pair of clients exchanges packets through it."""
