"""Kinds of datasets that a dataset string can name, one file each; this is the folder to add your own to."""
