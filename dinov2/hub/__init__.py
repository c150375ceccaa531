"""Published weights: read their files and load them into backbones."""
