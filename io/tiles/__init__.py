"""From a slide to an encoder's input: tissue, grid, decoding, transform."""
