"""Volumes, and the work on those that no VM has open."""
