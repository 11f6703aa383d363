"""qcowlib: read, write and snapshot qcow2 disk images."""
