"""Virtual adapters of VMs on the host: taps, bridges, MAC addresses."""
