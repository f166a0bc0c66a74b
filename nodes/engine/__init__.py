"""The machinery behind the nodes: what stands on a MODEL, what happens in a run, files and pictures."""
