"""Writes a model as files that other runtimes compute."""
