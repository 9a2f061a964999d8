"""What is encoded where; built on `interp`, never on `circuits`."""
