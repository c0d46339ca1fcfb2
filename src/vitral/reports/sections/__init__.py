"""The sections of a report: each makes blocks of what it is given, and says what is missing."""
