"""The host agent: one actor per VM, jobs, adoption of running VMs."""
