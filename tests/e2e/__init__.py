"""End-to-end tests: the demo on the embedded cluster, real clients, and what happens to clusters."""
