"""The daemon `hostlerd`: configuration, composition, start and stop."""
