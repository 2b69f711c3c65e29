"""What this machine has, read from /proc and /sys."""
