"""The operator of DERP regions: one `DerpRegion` becomes keys, certificates, Services, relays and a DERP map."""
