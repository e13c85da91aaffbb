"""Commands, files, paths, JSON and trees: what every part needs and none is about."""
