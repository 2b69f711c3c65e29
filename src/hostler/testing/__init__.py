"""Part of the product for every test tier: simulated host, fake QMP server, micro guest, outside observers."""
