"""The tests, by tier. A package, so that one tier can use what another has (the peers of `tests.interop`)."""
