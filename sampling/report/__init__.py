"""The HTML report of a run, and summaries of code stores and prepared images."""
