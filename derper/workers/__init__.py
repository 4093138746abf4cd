"""Several cores for one relay: worker processes, and a supervisor that has the ports (docs/architecture.md)."""
