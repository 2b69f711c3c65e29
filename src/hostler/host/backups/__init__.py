"""Backups of VMs: made, looked at, restored."""
