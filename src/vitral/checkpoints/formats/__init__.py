"""Files of weights: safetensors, PyTorch's and NumPy's, read without executing anything."""
