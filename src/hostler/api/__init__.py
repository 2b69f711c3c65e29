"""The wire protocols: what programs and people reach a host through."""
