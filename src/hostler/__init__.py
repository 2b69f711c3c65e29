"""Hostler: a server-virtualization platform for Linux on QEMU."""

__version__ = "0.1.0"
