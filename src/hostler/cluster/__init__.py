"""Many hosts: who trusts whom, and how a VM moves from one to another with exactly one owner at every moment."""
