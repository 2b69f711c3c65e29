"""VHD and VHDX read by our own code: chains of differencing images, and images whose log is still to be replayed."""
