"""Image data sets, code stores and samplers."""
