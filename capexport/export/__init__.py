"""From checkpoints to ONNX artifacts; parity with PyTorch is part of every export."""
