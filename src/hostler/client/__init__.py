"""The client library: typed calls of the REST interface, for the command line, programs and other hosts."""
