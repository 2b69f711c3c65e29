"""Checkpoints and the layers they hold."""
