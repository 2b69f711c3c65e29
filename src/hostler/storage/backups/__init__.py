"""Backups in a directory: its layout, the files in it, and what is copied into and out of them."""
