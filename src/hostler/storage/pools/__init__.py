"""Pools of volumes: one contract (`contract.PoolDriver`), one driver for each kind."""
