"""The first minutes on a GPU: proofs, rates and the constants that they decide."""
