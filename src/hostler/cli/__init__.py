"""The command line `hostler`, built on the client library."""
