"""Attribution: how much each patch counts for a score. One row of a table a method (`methods.METHODS`)."""
