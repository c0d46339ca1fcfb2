"""The doctor: what wrong settings cost a classifier, and which setting looks wrong."""
