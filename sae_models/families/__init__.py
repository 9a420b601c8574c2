"""One module per published family of checkpoints: `detect(folder)`, `load(folder)`, `NAME`, `FILES`."""
