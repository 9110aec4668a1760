"""The built-in data set of videos: first-person walks through mazes of DeepMind Lab."""
