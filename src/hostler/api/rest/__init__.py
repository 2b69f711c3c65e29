"""The REST interface: routes without logic on top of the application functions."""
