"""Machines that come from elsewhere, and VMs that go there."""
