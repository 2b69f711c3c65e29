"""Descriptions of machines that others wrote, read into values. Knows no volumes, no store and no QEMU."""
