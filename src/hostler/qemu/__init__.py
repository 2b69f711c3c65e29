"""One virtual machine, one QEMU process: command line, QMP session, disks, migration."""
