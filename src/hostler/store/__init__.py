"""The state of the system behind one contract: embedded (SQLite) now, etcd beside it later."""
