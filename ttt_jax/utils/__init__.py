"""Commands, files, paths, JSON and trees, for all parts."""
