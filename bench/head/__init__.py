"""The head against its peers: `python -m bench.head`. Start in `harness`."""
