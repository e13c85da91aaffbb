"""Results on disk: results.json and the folder around it."""
