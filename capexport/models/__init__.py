"""The PyTorch models: what is trained, and what every export is held against."""
