"""Models on disk: our folder, the other libraries' layouts, conversion, the hub."""
