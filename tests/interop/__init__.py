"""Interoperation with the published Go module: stock relays, stock clients, real tailnet nodes."""
