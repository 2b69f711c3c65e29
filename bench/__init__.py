"""Measurements of Hostler beside bare QEMU and libvirt, in one run on one machine: `./run bench [NAME]`."""
