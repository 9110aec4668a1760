"""Video: frames predicted in code space, and frames in three codes (van den Oord et al. 2017, sections 4.2 and 4.4)."""
