"""Volumes: image formats, where they live, who may open them, how they are served."""
