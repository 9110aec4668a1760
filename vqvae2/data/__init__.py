"""Images, codes, and the order in which training sees them."""
