"""From files to batches beside the other libraries, each with its own loader."""
