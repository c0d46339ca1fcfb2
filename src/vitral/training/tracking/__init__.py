"""Follows runs with TensorBoard, Weights & Biases and MLflow."""
