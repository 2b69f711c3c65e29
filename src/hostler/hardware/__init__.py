"""What this host's hardware is and has."""
