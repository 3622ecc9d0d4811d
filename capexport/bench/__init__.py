"""`capbench`: PyTorch and ONNX side by side, on the same photos in the same process."""
