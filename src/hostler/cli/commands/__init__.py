"""The commands, one module for each few that belong together; imported only when one of them is used."""
