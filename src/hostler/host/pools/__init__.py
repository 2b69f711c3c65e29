"""Pools: where volumes are, how full it is, what goes on when there is room again."""
