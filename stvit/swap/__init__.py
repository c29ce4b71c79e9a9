"""Other people's models: finding their parts by structure, trying them, swapping, and folding for inference."""
