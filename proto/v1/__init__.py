"""Generated from `edgefm.proto`; regenerate with `make proto`."""
