"""Finds the fastest form of a model on this machine that keeps its accuracy, by measuring."""
