"""Turn a slide into an encoder's input: tissue, grid, decoding, transform."""
