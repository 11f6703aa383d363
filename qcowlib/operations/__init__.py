"""One module per verb, functions over images."""
