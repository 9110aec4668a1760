"""Show a run: an HTML report, and the contents of code stores and prepared data sets."""
