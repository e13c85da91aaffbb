"""Sound files to samples: containers, formats, levels, resampling."""
