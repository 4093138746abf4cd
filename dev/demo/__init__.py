"""The demo: a cluster, the operator's chart, one DerpRegion, and proof that its relays relay."""
