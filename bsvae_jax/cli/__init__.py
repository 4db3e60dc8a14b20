"""The command line, `bsvae`: begin with `main`."""
