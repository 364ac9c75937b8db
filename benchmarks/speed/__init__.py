"""qfae-bench: how fast every way to run one model is, and how far its scores are from PyTorch's."""
