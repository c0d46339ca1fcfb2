"""One file a command: its options, the one library call, and what it prints."""
