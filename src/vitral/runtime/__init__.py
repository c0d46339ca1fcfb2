"""The process and its surroundings: errors, devices, signals, streams, settings."""
