"""Speed, measured side by side with the other libraries."""
