"""One file an engine: what runs an exported model."""
