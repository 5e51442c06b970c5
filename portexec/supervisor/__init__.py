"""Everything that needs a parent: admission of the command's binds, signals, waiting. Nothing here is on the exec path."""
