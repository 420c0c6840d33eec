"""What the commands do, as short lists of stages; callable from Python as well."""
