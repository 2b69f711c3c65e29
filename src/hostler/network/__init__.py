"""How guests reach the network: taps on bridges, MAC addresses."""
