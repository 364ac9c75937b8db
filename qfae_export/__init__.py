"""Turn a checkpoint into an engine that was measured against PyTorch. See `export.export`."""
