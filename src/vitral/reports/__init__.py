"""Reports: what a run is and how good its model is, as one file that one can hand over."""
